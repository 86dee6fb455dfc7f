"""Supervision of a run: one supervisor on each host, and one head that decides.

A *worker* is the training process of one host. The *supervisor* on that host
(`supervisor`, `worker`) starts it, hears from it twice a second (`watchdog`), and
reports to the *head* (`head`, `gate`) on host 0. When a worker fails, the head finds
out which one was behind it (`verdict`), ends all, and begins the next *generation* of
workers, within the limits of `rules`. `record` writes the run's state to hosts.json.
"""

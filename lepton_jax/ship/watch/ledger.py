"""What each model has cost so far: time, energy and money.

Energy is measured for the whole machine, some interval at a time, and each interval is
shared out by the time for which batches were computed in it:

    an interval of 1.0 s, 50 J        computed      charged
    digits                             0.30 s        15 J
    titles                             0.10 s         5 J
    nobody                             0.60 s        30 J

So the charges and what nobody is charged for add up to what the counters say.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lepton_jax.monitor.energy import EnergyMeter
from lepton_jax.ship.watch.charges import THOUSAND, Price

Model = tuple[str, str]


@dataclass
class Account:
    """What one model has cost.

    Attributes:
      rows: predictions.
      seconds: of computing, padding included.
      padding_seconds: the part of it that went to empty rows.
      joules: of intervals that are over.
      padding_joules: the part of it that went to empty rows.
    """

    rows: int = 0
    seconds: float = 0.0
    padding_seconds: float = 0.0
    joules: float = 0.0
    padding_joules: float = 0.0
    _seconds_settled: float = 0.0
    _padding_settled: float = 0.0

    def add(
        self,
        rows: int,
        seconds: float,
        padding_seconds: float,
    ) -> None:
        """Add a batch."""
        self.rows += rows
        self.seconds += seconds
        self.padding_seconds += padding_seconds

    @property
    def pending(self) -> float:
        """Seconds whose energy is not yet known."""
        return self.seconds - self._seconds_settled

    def settle(self, watts: float) -> float:
        """Charge the pending seconds with a power; return the joules."""
        joules = watts * self.pending
        self.joules += joules
        self.padding_joules += watts * (self.padding_seconds - self._padding_settled)
        self._seconds_settled = self.seconds
        self._padding_settled = self.padding_seconds
        return joules


class Ledger:
    """The accounts of all models of a server.

    Attributes:
      unclaimed: joules in which nothing was computed.

    Args:
      energy: of the machine.
      price: None: not known.
      clock: returns seconds.
    """

    def __init__(
        self,
        energy: EnergyMeter,
        price: Price | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._energy = energy
        self._price = price
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: dict[Model, Account] = {}
        self._began = clock()
        self._since = self._began
        self._joules = energy.joules or 0.0
        self.unclaimed = 0.0

    def add(
        self,
        model: Model,
        rows: int,
        seconds: float,
        padding_seconds: float,
    ) -> None:
        """Add a batch to a model's account."""
        with self._lock:
            account = self._accounts.setdefault(model, Account())
            account.add(rows, seconds, padding_seconds)

    def settle(self) -> None:
        """Share out the energy since the last time."""
        joules = self._energy.joules
        if joules is None:
            return
        with self._lock:
            now = self._clock()
            seconds = now - self._since
            spent = joules - self._joules
            self._since = now
            self._joules = joules
            pending = sum(account.pending for account in self._accounts.values())
            # two models at once: each has the machine for its part of the time
            whole = max(seconds, pending)
            if whole <= 0:
                self.unclaimed += spent
                return
            watts = spent / whole
            claimed = [account.settle(watts) for account in self._accounts.values()]
            self.unclaimed += spent - sum(claimed)

    def costs(self, models: Iterable[Model]) -> dict[Model, dict[str, float]]:
        """Return figures of models, by the names of their gauges.

        Args:
          models: those that are served now.

        Returns:
          For each what is known: energy where it is measured, money where there is a
          price.
        """
        self.settle()
        with self._lock:
            computing = sum(account.seconds for account in self._accounts.values())
            wall = self._clock() - self._began
            accounts = {model: self._accounts.get(model, Account()) for model in models}
        return {
            model: self._energy_of(account) | self._money_of(account, wall, computing)
            for model, account in accounts.items()
        }

    # ---- internals ----

    def _energy_of(self, account: Account) -> dict[str, float]:
        if not self._energy.found.measured:
            return {}
        figures = {
            "joules": account.joules,
            "padding_joules": account.padding_joules,
        }
        if account.rows:
            each = account.joules / account.rows
            figures["joules_per_1000_predictions"] = each * THOUSAND
        return figures

    def _money_of(
        self,
        account: Account,
        wall: float,
        computing: float,
    ) -> dict[str, float]:
        price = self._price
        if price is None:
            return {}
        money = price.of(account.seconds, account.joules)
        figures = {
            "price": money,
            "padding_price": price.of(account.padding_seconds, account.padding_joules),
        }
        if account.rows and computing:
            its_wall = wall * account.seconds / computing
            whole = price.of(its_wall, account.joules)
            figures["price_per_1000_predictions"] = money / account.rows * THOUSAND
            figures["whole_price_per_1000_predictions"] = (
                whole / account.rows * THOUSAND
            )
        return figures

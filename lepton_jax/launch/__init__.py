"""The hosts of a run: how they are found, how they meet, and who watches over them.

In the order in which a launch uses the modules:

    discovery     the cluster of this process, from options or from `surroundings`
    cluster       that cluster as plain data, and addresses
    tokens        the secret by which the hosts know each other
    meeting       the roll call of all hosts, by `door`, `wire` and `proof`
    joining       one JAX of all processes
    children      hosts that one process starts
    supervise/    a supervisor on each host, which restarts its worker after a failure
    submit/       scripts and manifests that start a run on a cluster
    serve         the status of a run over HTTP
"""

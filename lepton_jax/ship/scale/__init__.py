"""Many replicas of a server, and many rows at once: Kubernetes, KServe and Ray.

    deployment = Deployment(name="digits", artifacts=("/models/digits.lepton",), ...)
    text = render("k8s", deployment)          # a manifest; `kserve`, `ray`: the same
    submit("k8s", deployment, text)           # handed to the cluster's own client

`lepton serve ARTIFACT --on PLACE` passes what stands behind `--on` to these two.
"""

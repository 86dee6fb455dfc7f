# From the repository's root: docker build -f docs/kubernetes/serve.Dockerfile --build-arg EXTRAS=serve,data,image -t IMAGE .
# docker run -p 8000:8000 -v $PWD:/models:ro IMAGE /models/digits.lepton
# With an artifact inside: put COPY digits.lepton /models/digits.lepton before USER
FROM python:3.12-slim AS build

WORKDIR /lepton
COPY pyproject.toml README.md LICENSE ./
COPY lepton_jax lepton_jax
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim

# serve for arrays alone; data for raw rows, image for pictures; cuda12, cuda13 or tpu for chips; otel for traces
ARG EXTRAS=serve,data,image

COPY --from=build /wheels /wheels
# the wheel that was just built is its own version
# hadolint ignore=DL3013
RUN set -- /wheels/*.whl && pip install --no-cache-dir "$1[${EXTRAS}]"

# the server may write to /tmp and /cache alone
RUN useradd --uid 10001 --no-create-home serve && mkdir -p /cache /models && chown serve /cache
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/cache \
    JAX_COMPILATION_CACHE_DIR=/cache/jax
USER 10001

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]

# SIGTERM reaches the server itself: it answers what it has accepted, then ends
ENTRYPOINT ["python3", "-m", "lepton_jax", "serve", "--host=0.0.0.0", "--port=8000"]
CMD ["--help"]

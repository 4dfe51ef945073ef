# The base gives the interpreter; from it only what runs is taken. Any Debian 12 image with Python 3.11 or newer, its venv
# module and CA certificates will do: --build-arg PYTHON_IMAGE=…
# The digest is the multi-platform index of that tag as published in September 2026. To move on, read the new one with
# `docker buildx imagetools inspect python:3.11-slim-bookworm` and change tag and digest together.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY exporter exporter
RUN python3 -m venv /opt/blueking-exporter \
 && /opt/blueking-exporter/bin/python -m pip install --only-binary :all: '.[redis,web-auth]' \
 && /opt/blueking-exporter/bin/python -m pip uninstall --quiet --yes setuptools pip
COPY deploy/image/rootfs.py /src/
RUN python3 /src/rootfs.py /opt/blueking-exporter /rootfs \
 && install -d -m 0700 /state/blueking-exporter

FROM scratch
ARG VERSION=0.0.0+unknown
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="blueking-exporter" \
      org.opencontainers.image.description="Prometheus exporter for Tencent BlueKing JOB and NodeMan" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /rootfs /
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build --chown=65532:65532 /state/ /var/lib/
# In a container loopback reaches nobody, and the configuration is mounted read-only, so the state lies elsewhere.
ENV PATH=/opt/blueking-exporter/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    BLUEKING_EXPORTER_WEB_LISTEN_ADDRESS=0.0.0.0:10071 \
    BLUEKING_EXPORTER_STATE_URL=sqlite:/var/lib/blueking-exporter/state.db
USER 65532:65532
WORKDIR /var/lib/blueking-exporter
VOLUME ["/var/lib/blueking-exporter"]
EXPOSE 10071
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["blueking-exporter", "healthcheck"]
ENTRYPOINT ["blueking-exporter"]
CMD ["run", "--config.file=/etc/blueking-exporter/config.yaml"]

# Any builder will do; to say what the image was made from:
#   docker build --build-arg REVISION="$(git rev-parse HEAD)" --tag creatify-exporter .
ARG PYTHON_VERSION=3.13

FROM python:${PYTHON_VERSION}-slim AS build
WORKDIR /src
COPY requirements.lock requirements-build.lock ./
RUN python -m venv --without-pip /opt/creatify-exporter \
 && pip --python /opt/creatify-exporter install --no-cache-dir --no-deps --require-hashes --only-binary :all: --requirement requirements.lock \
 && pip install --no-cache-dir --no-deps --require-hashes --requirement requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY creatify_exporter creatify_exporter
ARG REVISION=unknown
RUN sed -i "s/[$]Format:%H[$]/$REVISION/" creatify_exporter/__init__.py \
 && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
 && pip --python /opt/creatify-exporter install --no-cache-dir --no-deps --no-index /wheels/*.whl

FROM python:${PYTHON_VERSION}-slim
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="creatify-exporter" \
      org.opencontainers.image.description="Prometheus exporter for Creatify's text generator" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
COPY --from=build /opt/creatify-exporter /opt/creatify-exporter
# Everything is compiled at install time; nothing is written at run time but the ledger, in the working directory.
ENV PATH=/opt/creatify-exporter/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
RUN install -d -o 65534 -g 65534 -m 0750 /data
WORKDIR /data
VOLUME /data
USER 65534:65534
EXPOSE 9877
STOPSIGNAL SIGTERM
# Of no use behind --web.config.file or on another address: give `docker run` a --health-cmd of your own then.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9877/-/healthy', timeout=4)"]
ENTRYPOINT ["creatify-exporter"]

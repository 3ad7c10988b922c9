# Breakwater in a container. No image is published: `docker build --tag breakwater:local .`
#
# The first stage installs under the hashes of the lock file and from wheels alone, so nothing is compiled. The second
# takes the finished environment, and has neither pip's cache nor what built it.

FROM python:3.11-slim-bookworm AS build

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv /opt/breakwater
COPY requirements.lock ./
RUN /opt/breakwater/bin/pip install --require-hashes --only-binary :all: --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY proxy ./proxy
RUN /opt/breakwater/bin/pip install --no-deps --no-build-isolation . \
    && /opt/breakwater/bin/pip uninstall --yes hatchling editables setuptools pip

FROM python:3.11-slim-bookworm

COPY --from=build /opt/breakwater /opt/breakwater
# Nothing is written while it runs: bytecode was compiled above, and the root may be read-only.
ENV PATH=/opt/breakwater/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
# A number, since Kubernetes' runAsNonRoot cannot judge a name.
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["breakwater", "health"]
# As a list, so that the process is number 1 and gets the signals itself.
ENTRYPOINT ["breakwater"]
CMD ["serve", "-c", "/etc/breakwater/breakwater.yaml", "--host", "0.0.0.0", "--port", "8080"]

# The image of the DaemonSet. The host gives devices, the kubelet's and the runtime's sockets; CUPS is in here.
FROM debian:12-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv
WORKDIR /src
COPY requirements.lock ./
RUN python3 -m venv /opt/nodeagent \
    && /opt/nodeagent/bin/pip install --no-cache-dir --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY nodeagent nodeagent
COPY device_plugins device_plugins
COPY seccomp seccomp
RUN /opt/nodeagent/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM debian:12-slim
# cups-daemon would start a server at installation where an init runs; here none does.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        python3 libudev1 libseccomp2 cups-daemon cups-filters ghostscript fonts-dejavu-core fonts-droid-fallback \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/nodeagent /opt/nodeagent
ENV PATH=/opt/nodeagent/bin:/usr/sbin:/usr/bin:/sbin:/bin
ENTRYPOINT ["nodeagent"]
CMD ["run"]

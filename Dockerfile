# Three images: forge (default), nats, comfyui. `compose.yml` builds all of them; by hand: docker build --target forge .
# Each runs as user 10001, whose the volumes are, so that forge may clean up behind ComfyUI.

ARG PYTHON=3.12.12-slim-bookworm
ARG NATS=2.15.1-alpine

# ---------------------------------------------------------------- forge
FROM python:${PYTHON} AS forge-build
WORKDIR /src
RUN python -m venv /opt/forge
ENV PATH=/opt/forge/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY requirements.lock .
RUN pip install --require-hashes -r requirements.lock
COPY pyproject.toml README.md ./
COPY nats nats
COPY migrations migrations
COPY src src
RUN pip install --no-deps --no-build-isolation . && python -m compileall -q /opt/forge

FROM python:${PYTHON} AS forge
RUN useradd --system --uid 10001 --user-group --home-dir /data forge && install -d -o forge -g forge /data
COPY --from=forge-build /opt/forge /opt/forge
ENV PATH=/opt/forge/bin:$PATH PYTHONUNBUFFERED=1 FORGE_DATA_DIR=/data FORGE_HOST=0.0.0.0
USER forge
WORKDIR /data
VOLUME /data
EXPOSE 8600
ENTRYPOINT ["forge"]
CMD ["api"]

# ---------------------------------------------------------------- nats
FROM nats:${NATS} AS nats
RUN adduser -S -D -H -u 10001 forge && install -d -o forge /data
COPY nats/*.conf /etc/nats/
COPY --chmod=0755 deploy/nats/start /usr/local/bin/start
USER forge
VOLUME /data
ENTRYPOINT ["start"]
CMD ["-c", "/etc/nats/nats-server.conf", "-sd", "/data"]

# ---------------------------------------------------------------- comfyui
# Without custom nodes and without their manager: what a prompt may name is what ComfyUI itself brings.
FROM python:${PYTHON} AS comfyui
ARG COMFYUI=v0.28.0
ARG TORCH_INDEX=
ADD https://github.com/Comfy-Org/ComfyUI.git#${COMFYUI} /opt/comfyui
WORKDIR /opt/comfyui
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision torchaudio && \
    pip install -r requirements.txt
RUN useradd --system --uid 10001 --user-group --home-dir /data forge && install -d -o forge -g forge /data
USER forge
VOLUME /data
EXPOSE 8188
ENTRYPOINT ["python", "main.py", "--listen", "0.0.0.0", "--port", "8188", "--base-directory", "/data", \
    "--disable-metadata", "--disable-all-custom-nodes", "--disable-api-nodes"]

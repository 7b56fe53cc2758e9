# syntax=docker/dockerfile:1
# The CPU image:  docker build -f images/cpu.dockerfile -t REGISTRY/diptych:0.1.0 .
# Pin the base by digest where it is built, so that a rebuild is the same:  --build-arg BASE=python:3.11-slim@sha256:...
# (no digest stands here, because nobody has built this from one). Versions are pinned by constraints.txt.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS wheel
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE} AS packages
# An index of torch builds without CUDA makes the image some gigabytes smaller; empty is pip's own.
ARG TORCH_INDEX=""
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /wheels
RUN python -m venv /opt/diptych
RUN /opt/diptych/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} /wheels/*.whl

FROM ${BASE}
LABEL org.opencontainers.image.title="diptych" \
      org.opencontainers.image.description="A disaggregated LLM serving cluster"
# The C++ kernels are compiled where they run, for that processor: into DIPTYCH_CACHE, or /tmp where that is read-only.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ libc6-dev && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 1000 diptych && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp diptych
COPY --from=packages /opt/diptych /opt/diptych
# Nothing is written but to volumes: no bytecode, and what looks for a home finds /tmp.
ENV PATH=/opt/diptych/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
USER 1000:1000
EXPOSE 8000 50051
CMD ["diptych", "serve", "--http", "0.0.0.0:8000", "--grpc", "0.0.0.0:50051"]

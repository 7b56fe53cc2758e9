# syntax=docker/dockerfile:1
# The CUDA image:  docker build -f images/cuda.dockerfile -t REGISTRY/diptych:0.1.0-cuda .
# torch's own wheels bring CUDA's libraries; the driver comes from the machine (NVIDIA's container toolkit). The base is
# the CPU image's, for a smaller list of packages to look after. Pin it by digest:  --build-arg BASE=...@sha256:...
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS wheel
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE} AS packages
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /wheels
RUN python -m venv /opt/diptych
# Not the constraints' torch: that may be a build without CUDA. cupy maps KV memory into other processes.
RUN grep -v '^torch==' /tmp/constraints.txt >/tmp/constraints-cuda.txt
RUN /opt/diptych/bin/pip install --no-cache-dir --constraint /tmp/constraints-cuda.txt "$(echo /wheels/*.whl)[cuda]"

FROM ${BASE}
LABEL org.opencontainers.image.title="diptych" \
      org.opencontainers.image.description="A disaggregated LLM serving cluster, CUDA"
# Triton compiles a launcher with the machine's compiler when it first runs, and the scheduler what prices placements.
# The adapters' libraries are for RDMA.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ libc6-dev libibverbs1 ibverbs-providers librdmacm1 && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 1000 diptych && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp diptych
COPY --from=packages /opt/diptych /opt/diptych
ENV PATH=/opt/diptych/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
EXPOSE 8000 50051
CMD ["diptych", "serve", "--http", "0.0.0.0:8000", "--grpc", "0.0.0.0:50051"]

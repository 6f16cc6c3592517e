# An image for CPUs or for one CUDA version: only torch differs, by the index that it comes from
# (docs/deploy.md). Runs as a user without rights, on a read-only root file system with /tmp.
ARG BASE=python:3.12.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Without pip of its own: what installs does not belong into the final image.
RUN python -m venv --without-pip /opt/mambamic
# A layer of its own, the largest one, that changes with the version of torch alone.
ARG TORCH=torch==2.13.0
ARG MAMBAMIC_TORCH_INDEX=
RUN python -m pip --python /opt/mambamic/bin/python install \
      ${MAMBAMIC_TORCH_INDEX:+--index-url "$MAMBAMIC_TORCH_INDEX"} "$TORCH"
WORKDIR /src
# The compiler of the CPU kernel is fetched by pip for this step, and gone after it.
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY kernels kernels
COPY handlers handlers
COPY export export
COPY deploy deploy
COPY mambamic mambamic
RUN python -m pip --python /opt/mambamic/bin/python install \
      --constraint constraints.txt '.[serve]' dumb-init

FROM ${BASE} AS server
RUN python -m pip uninstall --yes pip \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp/home mambamic \
 && install --directory --owner=10001 --group=10001 /var/cache/mambamic /edge
COPY --from=build /opt/mambamic /opt/mambamic
COPY model_store/mambamic_t_pbc /models/mambamic_t_pbc
# All that a server writes is below /tmp, but for compiled GPU kernels, which a volume may keep.
ENV PATH=/opt/mambamic/bin:$PATH \
    HOME=/tmp/home \
    MAMBAMIC_STATE=/tmp/mambamic \
    XDG_CACHE_HOME=/var/cache/mambamic \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /tmp
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
# A real prediction; --live is for orchestrators that start anew what fails (docs/deploy.md).
HEALTHCHECK --interval=30s --timeout=80s --start-period=3m --retries=3 \
  CMD ["mambamic", "health", "--ready", "--timeout=75"]
# As process 1 something has to reap the decoders of a worker that was killed.
ENTRYPOINT ["dumb-init", "--single-child", "--", "mambamic"]
CMD ["serve", "--foreground", "--host", "0.0.0.0", "--model", "/models/mambamic_t_pbc"]

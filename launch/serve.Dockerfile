# `llmjax serve` in a container, as a user without rights. Build at the repository's root:
#
#   docker build -f launch/serve.Dockerfile -t llmjax-serve .                      # CPU; --build-arg EXTRA=gpu or tpu for those
#   docker run --rm -p 8000:8000 -v "$PWD/model:/model:ro" -v "$PWD/keys:/keys:ro" llmjax-serve --model=/model --api-key-file=/keys
#
# SIGTERM (docker stop) finishes what runs: give it time, `docker stop --time=90`.
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRA=""
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY llmjax llmjax
COPY configs configs
RUN pip install --no-cache-dir ".[serve${EXTRA:+,${EXTRA}}]" && useradd --uid 10001 --create-home llmjax
USER 10001
ENV JAX_COMPILATION_CACHE_DIR=/tmp/jax LLMJAX_CACHE=/tmp/llmjax
EXPOSE 8000
ENTRYPOINT ["llmjax", "serve", "--host=0.0.0.0", "--port=8000"]
CMD ["--help"]

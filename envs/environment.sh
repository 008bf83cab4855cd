#!/usr/bin/env bash
# Make `.envs/NAME` from `envs/NAME.lock`, in the folder this is called from, where a run looks for it:
# `envs/environment.sh gears`. It holds exactly the packages of the lock, and this package without its own dependencies,
# so that `.envs/NAME/bin/perturbed fit` runs there. `.envs/NAME/.ready` is written last: where it stands and names the
# lock as it is now, there is nothing to do; a failed install leaves none. torch: as envs/install.sh does.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

die() { echo "perturbed: $*" >&2; exit 1; }

[ $# -eq 1 ] || die "usage: envs/environment.sh NAME, where envs/NAME.lock is the lock file"
lock=$root/envs/$1.lock home=$PWD/.envs/$1
[ -f "$lock" ] || die "$lock: no such file; known: $(cd "$root/envs" && ls ./*.lock | sed 's|^\./||; s|\.lock$||' | xargs)"
stamp=$(sha256sum "$lock" | cut -d' ' -f1)
if [ "$(cat "$home/.ready" 2>/dev/null)" = "$stamp" ]; then touch "$home/.ready"; exit 0; fi
rm -f "$home/.ready"

uv=${UV:-}
for candidate in "$root/.venv/bin/uv" uv; do
    if [ -z "$uv" ] && command -v "$candidate" >/dev/null; then uv=$candidate; fi
done
[ -n "$uv" ] || die "uv is needed to make $home; make .venv with envs/install.sh, or pip install uv"
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || command -v python3)}
links=${UV_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}
if [ -n "$links" ]; then export UV_FIND_LINKS=$links; else export UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-auto}; fi
export UV_COMPILE_BYTECODE=1 VIRTUAL_ENV="$home"

echo "perturbed: installing $lock into $home"
"$uv" venv --quiet --allow-existing --python "$python" "$home"
"$uv" pip sync --quiet "$lock"
"$uv" pip install --quiet --no-deps -e "$root"
"$home/bin/python" -c 'import perturbed.cli' || die "$home: perturbed does not import there; rerun after: rm -r $home"
echo "$stamp" > "$home/.ready"

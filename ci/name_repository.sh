#!/usr/bin/env bash
# Put the name of who holds the public repository in the place of OWNER, in every file that names its address:
#
#     ci/name_repository.sh NAME
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-}
if ! [[ $name =~ ^[A-Za-z0-9]([A-Za-z0-9-]{0,37}[A-Za-z0-9])?$ ]]; then
  echo "usage: ci/name_repository.sh NAME, a user or an organization of GitHub" >&2
  exit 2
fi
placeholder='github.com/''OWNER/qlora-hal'  # in two parts, so that this line stays as it is
{ git grep -lzF "$placeholder" || [ $? -eq 1 ]; } | xargs -0 --no-run-if-empty sed -i "s#${placeholder//./\\.}#github.com/$name/qlora-hal#g"

# Where compilers and caches may write: nothing of the image itself, so a read-only root and any user id will do. Each
# container gets a folder of its own, because whoever made a folder of a known name in a shared /tmp first could put code
# into it. What is set already stays as it is.
: "${TMPDIR:=/tmp}"
if [ -z "${MILKTEA_CACHE:-}" ]; then MILKTEA_CACHE=$(mktemp -d "$TMPDIR/milktea-XXXXXXXX"); fi
: "${PYTHONPYCACHEPREFIX:=$MILKTEA_CACHE/python}"
: "${TORCHINDUCTOR_CACHE_DIR:=$MILKTEA_CACHE/inductor}"
: "${TRITON_CACHE_DIR:=$MILKTEA_CACHE/triton}"
: "${MPLCONFIGDIR:=$MILKTEA_CACHE/matplotlib}"
: "${TOKENIZERS_PARALLELISM:=false}"
export TMPDIR MILKTEA_CACHE PYTHONPYCACHEPREFIX TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR MPLCONFIGDIR TOKENIZERS_PARALLELISM
case ":$PATH:" in *:/opt/venv/bin:*) ;; *) PATH=/opt/venv/bin:$PATH; export PATH ;; esac

# Where compilers and caches may write: nothing of the image itself, so a read-only root and any user id will do.
# What is set already stays as it is.
: "${TMPDIR:=/tmp}"
: "${PYTHONPYCACHEPREFIX:=$TMPDIR/milktea-pycache}"
: "${TORCHINDUCTOR_CACHE_DIR:=$TMPDIR/milktea-inductor}"
: "${TRITON_CACHE_DIR:=$TMPDIR/milktea-triton}"
: "${MPLCONFIGDIR:=$TMPDIR/milktea-matplotlib}"
: "${TOKENIZERS_PARALLELISM:=false}"
export TMPDIR PYTHONPYCACHEPREFIX TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR MPLCONFIGDIR TOKENIZERS_PARALLELISM
case ":$PATH:" in *:/opt/venv/bin:*) ;; *) PATH=/opt/venv/bin:$PATH; export PATH ;; esac

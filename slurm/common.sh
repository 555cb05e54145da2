# Sourced by the job scripts of this folder, on the node where they run or before submission: checks and the launch.

root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}
if [ -f "$root/slurm/site.env" ]; then . "$root/slurm/site.env"; fi

die() {
    echo "error: $*" >&2
    exit 2
}

# check SCRIPT NEEDED ARGUMENT... : --help, at least so many arguments, the first one a file; then the environment.
# Outside of a job it ends here: nothing is started by accident on a login node.
check() {
    local script=$root/slurm/$1 needed=$2
    shift 2
    if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
        sed -n '2,/^$/{/^#SBATCH/d; s/^# \{0,1\}//p}' "$script"
        exit 0
    fi
    [ $# -ge "$needed" ] || die "$# arguments, $needed are needed; see: bash slurm/$(basename "$script") --help"
    cd "$root"
    [ -f lp_train/finetune.py ] || die "$root: no lp_train/finetune.py in it; submit from the repository's folder"
    [ -f "$1" ] || die "$1: no such file in $root; give its path"
    if [ -n "${LP_MODULES:-}" ]; then module load $LP_MODULES; fi
    local venv=${LP_VENV:-$root/.venv}
    if [ -f "$venv/bin/activate" ]; then . "$venv/bin/activate"; fi
    [ -n "${LP_CONTAINER:-}" ] || command -v accelerate >/dev/null || die "$venv: no accelerate there; set LP_VENV"
    [ -n "${SLURM_JOB_ID:-}" ] || die "arguments are good, but this is no Slurm job; submit it with sbatch"
    export HF_HUB_DISABLE_TELEMETRY=1 LP_SBATCH=$0 # Slurm's copy of the job script, which the run keeps
}

# launch ARGUMENT... : finetune.py on every node of the job, as one world whose size the program asserts.
launch() {
    local nodes=$SLURM_JOB_NUM_NODES head port processes engine
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    head=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') # a node's name need not resolve
    port=$((20000 + SLURM_JOB_ID % 20000))
    processes=${LP_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
    export LP_WORLD_SIZE=$((nodes * processes)) LP_CONTAINER=${LP_CONTAINER:-}
    engine=(--config_file configs/accelerate/single.yaml)
    if [ "$LP_WORLD_SIZE" -gt 1 ]; then
        engine=(--config_file "${LP_ENGINE:-configs/accelerate/ddp.yaml}" --num_processes "$LP_WORLD_SIZE")
        engine+=(--num_machines "$nodes" --main_process_ip "$head" --main_process_port "$port")
    fi
    # A signal is for the program: its launcher, which would end it, is made deaf. $SLURM_NODEID is that of each node.
    export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGINT
    srun --kill-on-bad-exit=1 --ntasks="$nodes" --ntasks-per-node=1 bash -c 'trap "" TERM USR1
        rank=(); [ "$SLURM_JOB_NUM_NODES" = 1 ] || rank=(--machine_rank "$SLURM_NODEID")
        exec $LP_CONTAINER accelerate launch --quiet "${rank[@]}" "$@"' launch \
        "${engine[@]}" lp_train/finetune.py "$@" --requeue
}

version 1.0

# job: "chris-jid-1"
# user: "cube"
# label: "group=100\u0025"
# label: "site=a b"

task plugin_instance {
  command <<<
    # Ends this job without running the plugin; pman shows the reason to the user.
    refuse() {
        echo "pman: $1" >&2
        printf '%s\n' "$1" > pman-reason
        exit 1
    }

    # Once: whoever makes this folder runs the plugin, and nobody else ever does.
    if ! mkdir pman-lock 2> /dev/null; then
        [ -d pman-lock ] || { echo "pman: the job's folder $PWD can't be written" >&2; exit 1; }
        refuse "started again by the cluster after it had begun; a plugin is never run twice"
    fi

    [ -d /share/incoming ] || refuse $'the input folder /data/home/100%/in is not mounted at /share/incoming: Cromwell\'s submit-docker is to bind it there'
    [ -d /share/outgoing ] || refuse $'the output folder /data/home/cube/out is not mounted at /share/outgoing: Cromwell\'s submit-docker is to bind it there'

    exec env $'GREETING=hello \'you\'\012' HOME=/tmp 'simple dsapp' --message $'it\'s \044(id)\012\140id\140 "\303\251"' /share/incoming ''
  >>>

  runtime {
    docker: "/images/simple.sif"
    sharedir: "/data/home"
    incoming: "100\u0025/in"
    outgoing: "cube/out"
    cpu: 2
    memory: "200 MiB"
    gpu_limit: 1
    number_of_workers: 2
    timelimit: 1501
    slurm_partition: "gpu"
    slurm_account: "proj-1"
    slurm_qos: "high"
    slurm_constraint: "ib"
    slurm_reservation: "r1"
    maxRetries: 0
    failOnStderr: false
    continueOnReturnCode: 0
  }
}

workflow ChRISJob {
  call plugin_instance
}

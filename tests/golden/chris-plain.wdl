version 1.0

# job: "chris-jid-1"
# user: "cube"

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

    [ -d /share/incoming ] || refuse $'the input folder /data/home/cube/in is not mounted at /share/incoming: Cromwell\'s submit-docker is to bind it there'
    [ -d /share/outgoing ] || refuse $'the output folder /data/home/cube/out is not mounted at /share/outgoing: Cromwell\'s submit-docker is to bind it there'

    exec simpledsapp --prefix le /share/incoming /share/outgoing
  >>>

  runtime {
    docker: "ghcr.io/fnndsc/pl-simpledsapp:2.1.0"
    sharedir: "/data/home/cube"
    incoming: "in"
    outgoing: "out"
    gpu_limit: 0
    number_of_workers: 1
    maxRetries: 0
    failOnStderr: false
    continueOnReturnCode: 0
  }
}

workflow ChRISJob {
  call plugin_instance
}

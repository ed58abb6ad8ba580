# A container as a job of Nomad: nomad job run nomad.hcl. The client's configuration has to allow the driver raw_exec.
job "redis" {
  group "redis" {
    task "redis" {
      driver = "raw_exec"

      # dist-run becomes run: Nomad's TERM reaches the container, and its KILL ends the container too.
      config {
        command = "dist-run"
        args = [
          "--rm", "--init", "--id", "redis-${NOMAD_ALLOC_ID}", "--memory", "256m",
          "--net", "bridge", "-p", "127.0.0.1:6379:6379", "--", "docker.io/library/redis:latest",
        ]
      }

      env {
        DIST_ROOT = "/var/lib/distkit/content"
      }

      kill_signal  = "SIGTERM"
      kill_timeout = "20s"
    }
  }
}

package runtime

import (
	"os"
	"strconv"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxSockets bounds the number of sockets that a supervisor passes. systemd allows a unit no more descriptors.
const maxSockets = 4096

// firstSocket is the descriptor of the first socket, also in the container.
const firstSocket = 3

// takeSockets returns the sockets that a supervisor has passed to this program (sd_listen_fds(3)), and the variables
// that describe them to a container's first process. It removes the variables from the environment, so that no other
// program started here uses them: crun would, without checking whom they are for. InvalidArgument: the sockets are not
// there.
func takeSockets() (files []*os.File, env []string, err error) {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(v)
	}
	// the supervisor may have started dist-userns, and that this program
	if pid == "" || pid != strconv.Itoa(os.Getpid()) && pid != os.Getenv("DIST_PARENT") {
		return nil, nil, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > maxSockets {
		return nil, nil, invalid("LISTEN_FDS: %.20q is no number of sockets", count)
	}
	for fd := firstSocket; fd < firstSocket+n; fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, nil, invalid("LISTEN_FDS: descriptor %d of %d sockets is not open", fd, n)
		}
		files = append(files, os.NewFile(uintptr(fd), "socket "+strconv.Itoa(fd)))
	}
	if n > 0 {
		env = []string{"LISTEN_FDS=" + count, "LISTEN_PID=1"}
		if names != "" {
			env = append(env, "LISTEN_FDNAMES="+names)
		}
	}
	return files, env, nil
}

// passSockets adds the variables about a supervisor's sockets to a container's first process, which is number 1 in its
// own PID namespace. A restored process has the variables with which it was stored.
func passSockets(s *specs.Spec, env []string, restored bool) error {
	switch {
	case len(env) == 0:
		return nil
	case restored:
		return failed("its processes were stored, and can't be given the supervisor's sockets")
	case !ownPIDs(s.Linux):
		return failed("its first process can't be told of the supervisor's sockets: it has no PID namespace of its own")
	}
	s.Process.Env = append(s.Process.Env, env...)
	return nil
}

// tellReady tells a supervisor that waits for it, such as systemd for Type=notify, that the container runs
// (sd_notify(3)). The container itself can't reach the supervisor. As with sd_notify, errors are ignored.
func tellReady() {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	_ = unix.Sendto(fd, []byte("READY=1"), unix.MSG_NOSIGNAL, &unix.SockaddrUnix{Name: name}) // @ stands for the NUL of an abstract name
}

package runtime

import (
	"os"
	"strconv"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxSockets bounds how many sockets a supervisor passes: systemd has no more descriptors for a unit's.
const maxSockets = 4096

// firstSocket is the descriptor that the first of them has, for the container too.
const firstSocket = 3

// takeSockets returns the sockets that a supervisor has passed to this program (sd_listen_fds(3)), and the variables that tell a
// container's first process of them. They are taken once: no other program that this one starts takes them for its own, as crun
// would, which does not look for whom they are. The error is InvalidArgument if they are not there.
func takeSockets() (files []*os.File, env []string, err error) {
	pid, count, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, v := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(v)
	}
	// dist-userns, which the supervisor started, may stand between.
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

// passSockets tells a container's first process, which has the number 1 in its own PID namespace, of a supervisor's sockets.
// A process that is restored has the variables that it was stored with.
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

// tellReady tells a supervisor that waits for that, as systemd does for Type=notify, that the container runs (sd_notify(3)). The
// container itself can't speak to the supervisor. As for sd_notify, a failure is the supervisor's affair.
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
	_ = unix.Sendto(fd, []byte("READY=1"), unix.MSG_NOSIGNAL, &unix.SockaddrUnix{Name: name}) // @ begins an abstract name
}

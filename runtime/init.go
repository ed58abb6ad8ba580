package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"syscall"
	"time"

	"distkit/runtime/spec"

	"golang.org/x/sys/unix"
)

// becomeListener is the argument 0 that makes this program become the command in its arguments, after it has set the
// variables of sd_listen_fds(3). These contain the process's own number.
const becomeListener = "distkit-listener"

// runInit is the first process of a container made with --init. It starts the command, forwards signals to it, reaps
// orphans, and exits with the command's status. When the first process ends, the kernel kills all others.
func runInit(args []string) (status int) {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "init:", err)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrNotFound) {
			return 127
		}
		return 126
	}
	if len(args) == 0 {
		return fail(fs.ErrNotExist)
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return fail(err)
	}
	// In another container's PID namespace it is not the first process, so orphans must be redirected to it.
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	ended, others := make(chan os.Signal, 1), make(chan os.Signal, 64)
	signal.Notify(ended, unix.SIGCHLD)
	signal.Notify(others)
	attr := &os.ProcAttr{Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}, Sys: &syscall.SysProcAttr{}}
	if _, err := unix.IoctlGetInt(0, unix.TIOCGPGRP); err == nil { // the terminal's signals go to the command only
		attr.Sys.Foreground = true
	}
	if os.Getenv("LISTEN_PID") != "" {
		path, args = "/proc/self/exe", append([]string{becomeListener, path}, args...)
	}
	command, err := os.StartProcess(path, args, attr)
	if err != nil {
		return fail(err)
	}
	for {
		select {
		case <-ended:
			for {
				var ws unix.WaitStatus
				pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
				if errors.Is(err, unix.EINTR) {
					continue
				}
				if err != nil || pid <= 0 {
					break
				}
				if pid == command.Pid {
					return statusOf(ws)
				}
			}
		case s := <-others:
			// the Go runtime sends itself URG
			if s != unix.SIGCHLD && s != unix.SIGURG {
				_ = unix.Kill(command.Pid, s.(syscall.Signal))
			}
		}
	}
}

// listen becomes the command in args.
func listen(args []string) (status int) {
	_ = os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	err := unix.Exec(args[0], args[1:], os.Environ())
	fmt.Fprintln(os.Stderr, "init:", err)
	return 126
}

// hasInit reports whether the container was made with --init.
func (b *bundle) hasInit() bool {
	args := b.spec.Process.Args
	return len(args) > 1 && args[0] == spec.InitPath && slices.ContainsFunc(b.spec.Mounts, spec.IsInit)
}

// command returns the container's command, without the init.
func (b *bundle) command() []string {
	if b.hasInit() {
		return b.spec.Process.Args[1:]
	}
	return b.spec.Process.Args
}

// initPatience is how long a signal waits for the init to start.
const initPatience = 2 * time.Second

// awaitInit waits, before a signal is sent, until the container's init handles signals, but no longer than
// [initPatience]. An earlier signal would kill the runtime's process that becomes the init, or the init before it has
// started the command, or the kernel would drop it.
func (s *state) awaitInit(sig unix.Signal) {
	if !s.Init || sig == unix.SIGKILL {
		return
	}
	// TTOU tells: the init catches all signals at the same time. TERM does not, since the Go runtime catches it much
	// earlier, also in the runtime's process.
	for end := time.Now().Add(initPatience); time.Now().Before(end) && !catches(s.Pid, unix.SIGTTOU, "SigCgt"); {
		time.Sleep(5 * time.Millisecond)
	}
}

// signal sends a signal to the process: see [state.awaitInit].
func (s *state) signal(sig unix.Signal) error {
	s.awaitInit(sig)
	return s.HostProcess.signal(sig)
}

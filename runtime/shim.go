package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"distkit/errclass"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// shimName is the argument 0 with which this program runs as a shim, the monitor of a detached process, or as a
// [guard].
const shimName = "distkit-shim"

// Descriptors that a shim inherits. On its standard input it gets an order.
const (
	shimLock = 3 + iota
	shimClaim
	shimWorking
	shimReport
	shimOutput // see Runtime.LogTo
	shimMounts // see privateMounts
	shimRoot
	shimRest // the first descriptor that it must not inherit
)

// order tells a shim or a guard which process it is for. The rest are fields of the shim's [execution].
type order struct {
	Root      string `json:"root"`
	Namespace string `json:"namespace"`
	ID        string `json:"id"`
	Exec      string `json:"exec,omitempty"` // ID of a further process in the container
	State     string `json:"state"`
	Monitors  string `json:"monitors,omitempty"` // see placement
	Guard     bool   `json:"guard,omitempty"`

	Command string         `json:"command,omitempty"` // of the runtime
	Job     job            `json:"job,omitzero"`
	Run     state          `json:"run,omitzero"`
	Images  string         `json:"images,omitempty"`
	Config  *specs.Process `json:"config,omitempty"`
	Mounts  bool           `json:"mounts,omitempty"` // the shim inherits a mount namespace
	Adopt   bool           `json:"adopt,omitempty"`  // the process is running already
}

// report is what a shim reports once the process runs, or has failed to start.
type report struct {
	Pid   int    `json:"pid"`
	Error string `json:"error,omitempty"`
	Exit  int    `json:"exit,omitempty"` // ExitStatus of the error

	Denied bool `json:"denied,omitempty"` // the error is PermissionDenied
}

// detach starts the process under a shim. On failure it calls abandon.
func (u *execution) detach(ctx context.Context) (pid int, err error) {
	if pid, err = u.spawnShim(false); err != nil {
		return -1, u.abandon(ctx, err)
	}
	u.mounts.close()
	// The shim has inherited the locks, so they stay locked.
	u.claim.close()
	_ = u.lock.Close()
	return pid, nil
}

// spawn runs this program as a shim, which writes a report, or as a guard.
func (u *execution) spawn(stdin io.Reader, report *os.File) (*exec.Cmd, error) {
	c := exec.Command("/proc/self/exe")
	c.Args = []string{shimName, u.c.ID} // shown by ps
	c.Dir, c.Env, c.Stdin = "/", shimEnviron(), stdin
	// Every number is filled, if only with nothing. Otherwise the child would get a descriptor of that number that this
	// process has inherited.
	mounts, root := u.mounts.files()
	c.ExtraFiles = []*os.File{u.lock, u.claim.lock, u.claim.working, report, u.r.output, mounts, root}
	if report == nil {
		for _, fd := range []int{shimWorking, shimOutput, shimMounts, shimRoot} { // a guard waits for the holder of this lock, so it must not inherit it
			c.ExtraFiles[fd-shimLock] = nil
		}
	}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return c, c.Start()
}

// order returns the order for a guard.
func (u *execution) order() order {
	return order{Root: u.c.set.root, Namespace: u.c.Namespace, ID: u.c.ID, Exec: u.exec, State: u.c.set.state, Monitors: u.state.Monitors, Guard: true}
}

// spawnShim runs a shim, which starts or adopts the process, and returns when the process runs. After an error the shim
// has exited, and only the caller still holds the locks.
func (u *execution) spawnShim(adopt bool) (pid int, err error) {
	o := u.order()
	o.Guard, o.Adopt, o.Command, o.Job, o.Run, o.Images, o.Config, o.Mounts = false, adopt, u.r.command, u.job, u.state, u.images, u.config, u.mounts != nil
	b, err := json.Marshal(o)
	if err != nil {
		return -1, err
	}
	out, in, err := os.Pipe()
	if err != nil {
		return -1, err
	}
	defer out.Close()
	c, err := u.spawn(bytes.NewReader(b), in)
	_ = in.Close()
	if err != nil {
		return -1, fmt.Errorf("start the shim: %w", err)
	}
	var rep report
	err = json.NewDecoder(out).Decode(&rep)
	if err == nil && rep.Error == "" {
		// It stays when this process exits, and nobody waits for it.
		_ = c.Process.Release()
		return rep.Pid, nil
	}
	werr := c.Wait()
	if err != nil {
		return -1, fmt.Errorf("the shim ended before the process ran: %w", errors.Join(werr, err))
	}
	switch err = errors.New(rep.Error); {
	case rep.Denied:
		err = errclass.As(err, errdefs.ErrPermissionDenied)
	case rep.Exit == 127:
		err = errclass.As(err, ErrCommandNotFound)
	case rep.Exit == 126:
		err = errclass.As(err, ErrCommandNotExecutable)
	}
	return -1, err
}

// lean are settings of the Go runtime that keep a shim small: there may be hundreds of shims.
var lean = []string{"GOGC=20", "GOMEMLIMIT=6MiB", "GOMAXPROCS=2"}

// shimEnviron returns this process's environment without the variables about its open files.
func shimEnviron() []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return name == "DIST_HOLD" || slices.ContainsFunc(lean, func(l string) bool { return strings.HasPrefix(l, name+"=") })
	})
	return append(env, lean...)
}

// Opener opens the containers of a namespace in a store.
type Opener func(root, namespace, state string) (*Containers, error)

// Shim must be called first in main by every program that starts containers. If the program was run as a shim, a guard
// or a container's init, Shim does that work and does not return.
func Shim(open Opener) {
	switch os.Args[0] {
	case spec.InitPath:
		os.Exit(runInit(os.Args[1:]))
	case becomeListener:
		os.Exit(listen(os.Args[1:]))
	case shimName:
	default:
		return
	}
	closeInherited()
	for _, v := range lean {
		name, _, _ := strings.Cut(v, "=")
		_ = os.Unsetenv(name) // these settings are not for the runtimes, which are Go programs too
	}
	var o order
	err := json.NewDecoder(io.LimitReader(os.Stdin, spec.MaxDocument)).Decode(&o)
	var pipe int // a guard's standard input: its end means that the run was killed
	if err == nil {
		pipe, err = unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, shimRest)
	}
	if err == nil {
		err = quietly()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", shimName, err)
		os.Exit(1)
	}
	enterMonitors(o.Monitors)
	if o.Guard {
		err = o.guard(os.NewFile(uintptr(pipe), "pipe"), open)
	} else {
		_ = unix.Close(pipe)
		err = o.supervise(open)
	}
	if err != nil {
		os.Exit(1) // nobody to report to
	}
	os.Exit(0)
}

// closeInherited closes the descriptors that the shim's parent has inherited from others, since the shim may live
// longer than they.
func closeInherited() {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd < shimRest {
			continue
		}
		// Descriptors of the Go runtime are close-on-exec.
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			_ = unix.Close(fd)
		}
	}
	for _, fd := range []int{shimLock, shimClaim, shimReport, shimOutput, shimMounts, shimRoot} {
		unix.CloseOnExec(fd)
	}
}

// quietly redirects the shim's standard streams to /dev/null.
func quietly() error {
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(null)
	for fd := range 3 {
		if err := unix.Dup3(null, fd, 0); err != nil {
			return err
		}
	}
	return nil
}

// execution returns the execution of an order, with the locks that this process has inherited. A guard reopens the
// second lock: it has to wait for the runtime, which inherits the run's own descriptor.
func (o order) execution(open Opener) (*execution, error) {
	all, err := open(o.Root, o.Namespace, o.State)
	if err != nil {
		return nil, err
	}
	c, err := all.Get(o.ID)
	if err != nil && o.Guard {
		c, err = all.unread(o.ID), nil // the store was removed or the record is damaged, which must not keep the process alive
	}
	if err != nil {
		return nil, err
	}
	p := c.proc(o.Exec)
	u := &execution{Process: p, r: &Runtime{command: o.Command, state: o.State}, job: o.Job, state: o.Run, images: o.Images, config: o.Config}
	u.lock = os.NewFile(shimLock, filepath.Join(p.dir(), "lock"))
	u.claim = &claim{state: o.State, dir: p.private}
	if o.Exec == "" {
		u.claim.lock = os.NewFile(shimClaim, claimLock(o.State, c.key()))
	}
	if o.Guard {
		err = u.claim.openWorking()
	} else {
		u.claim.working = os.NewFile(shimWorking, u.claim.path("working"))
	}
	if o.Mounts {
		u.mounts = &privateMounts{os.NewFile(shimMounts, "mounts"), os.NewFile(shimRoot, "/")}
	}
	return u, err
}

// supervise starts or adopts a detached process, reports that, and records the end.
func (o order) supervise(open Opener) error {
	ctx := context.Background()
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
	terms := make(chan os.Signal, 8)
	signal.Notify(terms, unix.SIGTERM)
	var s *stdio.Detached
	wait := func() (Exit, error) { return Exit{}, nil }
	u, err := o.execution(open)
	if err == nil {
		if o.Adopt {
			s, wait, err = u.adopt()
		} else {
			s, wait, err = u.startDetached(ctx)
		}
	}
	rep := report{}
	if err != nil { // the parent cleans up
		rep = report{Error: err.Error(), Exit: ExitStatus(err), Denied: errdefs.IsPermissionDenied(err)}
	} else {
		rep.Pid = u.state.Pid
		s.Begin()
	}
	out := os.NewFile(shimReport, "report")
	if b, err := json.Marshal(rep); err == nil {
		_, _ = out.Write(b)
	}
	_ = out.Close()
	if err != nil {
		return err
	}
	shrink()
	go func() {
		for range terms {
			_ = u.state.signal(unix.SIGTERM)
		}
	}()
	e, err := wait()
	if err != nil {
		return err
	}
	atStep("reaped")
	defer s.Close()
	s.Settle()
	err = u.end(ctx, e)
	if u.exec != "" {
		s.Drain() // processes left in the container may still print
	}
	return err
}

// shrink frees memory that was needed only for starting: the heap's, and the program's pages. The kernel maps the few
// pages that waiting needs again from the file. Pages that differ from the file are kept, such as those of a
// position-independent program.
func shrink() {
	debug.FreeOSMemory()
	self, _ := os.Readlink("/proc/self/exe")
	maps, _ := os.ReadFile("/proc/self/smaps")
	var from, to uintptr
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line)
		switch {
		case len(f) > 1 && !strings.HasSuffix(f[0], ":"): // the first line of a mapping
			from, to = 0, 0
			if f[1][1] == '-' && strings.HasSuffix(line, " "+self+"\n") {
				_, _ = fmt.Sscanf(f[0], "%x-%x", &from, &to)
			}
		case len(f) > 1 && f[0] == "Anonymous:" && f[1] == "0":
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED)
		}
	}
}

// streams returns the options for the streams of a detached process.
func (u *execution) streams() stdio.Options {
	o := stdio.Options{Dir: u.private, Log: u.logDir(), LogSize: u.c.LogSize, Terminal: u.state.Terminal, Interactive: u.state.Interactive}
	switch u.state.Log {
	case noLog:
		o.NoLog = true
	case descriptorIs:
		o.Output = shimOutput
	}
	return o
}

// startDetached starts the process; it runs in the shim.
func (u *execution) startDetached(ctx context.Context) (s *stdio.Detached, wait func() (Exit, error), err error) {
	if u.state.Monitor, err = Identify(os.Getpid()); err == nil {
		err = u.writeState(u.state)
	}
	if err != nil {
		return nil, nil, err
	}
	atStep("shim")
	if s, err = u.streams().Open(u.claim.path("console")); err != nil {
		return nil, nil, err
	}
	u.state.Pipes = s.Pipes
	pid, err := u.start(ctx, &s.Ends, s.Console)
	return s, func() (Exit, error) {
		status, err := reap(pid)
		return exited(status), err
	}, err
}

// adopt makes this process the monitor of a process that has lost its own, and that is not a child of this process.
func (u *execution) adopt() (s *stdio.Detached, wait func() (Exit, error), err error) {
	fd, err := u.state.open()
	if err != nil {
		return nil, nil, err
	}
	if u.state.Log == descriptorIs { // that file was lost with the shim, so keep further output in a log
		u.state.Log = ""
	}
	if s, err = u.streams().Adopt(u.state.Pipes, u.state.findPipe); err == nil {
		u.state.Monitor, err = Identify(os.Getpid())
	}
	if err == nil {
		err = u.writeState(u.state)
	}
	return s, func() (Exit, error) { return waitForeign(u.state.HostProcess, fd), nil }, err
}

// findPipe opens a pipe that the process, or another process in its container, has open. It returns nil if none has.
// PermissionDenied: this process is in a user namespace that is neither theirs nor an ancestor of it.
func (s *state) findPipe(pipe string, mode int) (*os.File, error) {
	var denied error
	for _, pid := range append([]int{s.Pid}, processes(s.Cgroups)...) {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		fds, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrPermission) {
			denied = errclass.Errorf(errdefs.ErrPermissionDenied, "its streams can't be opened: %w", err)
		}
		for _, fd := range fds {
			name := filepath.Join(dir, fd.Name())
			if got, err := os.Readlink(name); err != nil || got != pipe {
				continue
			}
			f, err := unix.Open(name, mode|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			if err != nil {
				continue
			}
			if got, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f)); got == pipe {
				return os.NewFile(uintptr(f), pipe), nil
			}
			_ = unix.Close(f) // the number stands for another file by now
		}
	}
	return nil, denied
}

// guard is a small process beside a foreground run. It waits until the run's process is killed, which closes a pipe.
// Then it ends what the run has started, and cleans up.
type guard struct {
	process *os.Process
	pipe    *os.File // our end of the pipe, closed when this process exits
}

// startGuard starts the guard of a foreground run, before the runtime makes anything. The guard shares the locks, so
// the ID stays claimed until it is done.
func (u *execution) startGuard() error {
	b, err := json.Marshal(u.order())
	if err != nil {
		return err
	}
	out, in, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start the guard: %w", err)
	}
	defer out.Close()
	c, err := u.spawn(out, nil)
	if err == nil {
		if _, err = in.Write(b); err != nil {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
	}
	if err != nil {
		_ = in.Close()
		return fmt.Errorf("start the guard: %w", err)
	}
	u.guard = &guard{c.Process, in}
	return nil
}

// end stops the guard before the locks that it shares are released.
func (g *guard) end() {
	if g == nil {
		return
	}
	_ = g.process.Kill()
	go func() { _, _ = g.process.Wait() }() // another call may have reaped it
}

// guard waits until the run's process has exited, then ends what that has started.
func (o order) guard(pipe *os.File, open Opener) error {
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGPIPE)
	if _, err := io.Copy(io.Discard, pipe); err != nil {
		return err
	}
	u, err := o.execution(open)
	if err != nil {
		return err
	}
	return u.clearKilled(context.Background())
}

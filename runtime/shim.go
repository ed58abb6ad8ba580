package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

// shimName is the argument 0 that makes a program the shim of a detached container.
const shimName = "distkit-shim"

// Descriptors that a shim inherits beside an order on its standard input.
const (
	shimLock = 3 + iota
	shimClaim
	shimWorking
	shimReport
	shimRest // the first of those that it must not have
)

// order is what a shim has to do.
type order struct {
	Root      string `json:"root"`
	Namespace string `json:"namespace"`
	ID        string `json:"id"`
	Command   string `json:"command"` // the runtime's
	State     string `json:"state"`
	Job       job    `json:"job"`
	Run       state  `json:"run"`
	Adopt     bool   `json:"adopt,omitempty"` // the process runs already
	Guard     bool   `json:"guard,omitempty"` // see [guard]

	Images      string         `json:"images,omitempty"` // the processes' state, to be restored
	Exec        string         `json:"exec,omitempty"`   // a further process in the container
	Process     *specs.Process `json:"process,omitempty"`
	Interactive bool           `json:"interactive,omitempty"`
}

// report is what a shim tells once the process runs, or can't.
type report struct {
	Pid   int    `json:"pid"`
	Error string `json:"error,omitempty"`
	Exit  int    `json:"exit,omitempty"` // [ExitStatus] of the error

	Denied bool `json:"denied,omitempty"` // the error is PermissionDenied
}

// Start runs a container without anybody waiting for it: a shim, which is this program once
// more, has its standard streams, records its end, and then cleans up as [Container.Run] does. It
// returns once the process runs; the errors are those of Run.
//
// The program's main must call [Shim] first.
func (c *Container) Start(ctx context.Context, r *Runtime) (pid int, err error) {
	c.set.Clear(ctx)
	lock, err := c.lockStopped(ctx)
	if err != nil {
		return -1, err
	}
	return c.detach(ctx, r, lock, c.checkpoint())
}

// StartBundle makes a container for a bundle and starts it; with a bundle that is the directory
// of a container it starts that.
func (s *Containers) StartBundle(ctx context.Context, find Finder, rec Record) (c *Container, pid int, err error) {
	c, r, lock, err := s.forBundle(ctx, find, rec)
	if err != nil {
		return nil, -1, err
	}
	if pid, err = c.detach(ctx, r, lock, c.checkpoint()); err != nil && c.Bundle != "" {
		_, _ = c.Remove(ctx, false) // it was made for this
	}
	return c, pid, err
}

// detach starts a container; images is where the state of its processes is, if that was stored.
func (c *Container) detach(ctx context.Context, r *Runtime, lock *os.File, images string) (pid int, err error) {
	u, err := c.begin(ctx, r, lock, true)
	if err != nil {
		return -1, err
	}
	o := order{Root: c.set.root, Namespace: c.Namespace, ID: c.ID, Command: r.command, State: r.state, Job: u.job, Run: u.state, Images: images}
	rep, err := spawn(o, u.lock, u.claim)
	if err != nil {
		return -1, u.abandon(ctx, err)
	}
	// The shim has the locks now: they are one with these.
	u.claim.close()
	_ = lock.Close()
	return rep.Pid, nil
}

// spawn starts a shim. Where it fails, it has ended, and the locks are the caller's alone again.
func spawn(o order, lock *os.File, claim *claim) (report, error) {
	b, err := json.Marshal(o)
	if err != nil {
		return report{}, err
	}
	out, in, err := os.Pipe()
	if err != nil {
		return report{}, err
	}
	defer out.Close()
	c := exec.Command("/proc/self/exe")
	c.Args = []string{shimName, o.ID} // what ps shows
	c.Dir = "/"
	c.Env = shimEnviron()
	c.Stdin = strings.NewReader(string(b))
	c.ExtraFiles = []*os.File{lock, claim.lock, claim.working, in}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = c.Start()
	_ = in.Close()
	if err != nil {
		return report{}, fmt.Errorf("start the shim: %w", err)
	}
	var rep report
	err = json.NewDecoder(out).Decode(&rep)
	if err == nil && rep.Error == "" {
		// It is nobody's child once this process ends.
		_ = c.Process.Release()
		return rep, nil
	}
	werr := c.Wait()
	if err != nil {
		return report{}, fmt.Errorf("the shim ended before the process ran: %w", errors.Join(werr, err))
	}
	switch err = errors.New(rep.Error); {
	case rep.Denied:
		err = errclass.As(err, errdefs.ErrPermissionDenied)
	case rep.Exit == 127:
		err = errclass.As(err, ErrCommandNotFound)
	case rep.Exit == 126:
		err = errclass.As(err, ErrCommandNotExecutable)
	}
	return report{}, err
}

// lean are the settings of the Go runtime that keep a shim small: there may be hundreds.
var lean = []string{"GOGC=20", "GOMEMLIMIT=6MiB", "GOMAXPROCS=2"}

// shimEnviron is this process's environment but for what speaks of its open files.
func shimEnviron() []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return name == "DIST_HOLD" || slices.ContainsFunc(lean, func(l string) bool { return strings.HasPrefix(l, name+"=") })
	})
	return append(env, lean...)
}

// Shim is to be called first by the main of a program that starts containers: where the
// program was started as a shim it does a shim's work, and does not return. Open opens the
// containers of a store's namespace.
func Shim(open func(root, namespace, state string) (*Containers, error)) {
	if os.Args[0] != shimName {
		return
	}
	closeInherited()
	for _, v := range lean {
		name, _, _ := strings.Cut(v, "=")
		_ = os.Unsetenv(name) // runtimes are Go programs too
	}
	var o order
	err := json.NewDecoder(io.LimitReader(os.Stdin, spec.MaxDocument)).Decode(&o)
	if err == nil {
		err = quietly()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", shimName, err)
		os.Exit(1)
	}
	enterMonitors(o.Run.Monitors)
	work := o.work
	if o.Guard {
		work = o.guard
	}
	if err := work(open); err != nil {
		os.Exit(1) // there is nobody to tell
	}
	os.Exit(0)
}

// closeInherited closes what the shim's parent had from others: this outlives them.
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
		// The Go runtime's own are closed on exec.
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			_ = unix.Close(fd)
		}
	}
	for _, fd := range []int{shimLock, shimClaim, shimReport} {
		unix.CloseOnExec(fd)
	}
}

// quietly gives the shim nothing to read from or to write to.
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

// work runs the container and tells its beginning.
func (o order) work(open func(root, namespace, state string) (*Containers, error)) error {
	ctx := context.Background()
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
	terms := make(chan os.Signal, 8)
	signal.Notify(terms, unix.SIGTERM)
	out := os.NewFile(shimReport, "report")
	tell := func(r report) {
		b, err := json.Marshal(r)
		if err == nil {
			_, _ = out.Write(b)
		}
		_ = out.Close()
	}
	all, err := open(o.Root, o.Namespace, o.State)
	if err != nil {
		tell(report{Error: err.Error(), Exit: 125})
		return err
	}
	c, err := all.Get(o.ID)
	if err != nil {
		tell(report{Error: err.Error(), Exit: 125})
		return err
	}
	u := &execution{c: c, exec: o.Exec, images: o.Images, process: o.Process, r: &Runtime{command: o.Command, state: o.State}, job: o.Job, state: o.Run}
	u.lock = os.NewFile(shimLock, filepath.Join(u.place().dir(), "lock"))
	dir, lock := claimDir(o.State, c.key()), claimLock(o.State, c.key())
	if o.Exec != "" {
		dir = execScratch(o.State, c.key(), o.Exec)
		lock = dir + "/lock"
	}
	u.claim = &claim{state: o.State, dir: dir, lock: os.NewFile(shimClaim, lock), working: os.NewFile(shimWorking, dir+"/working")}
	if o.Exec == "" {
		o.Interactive = c.Interactive
	}
	if o.Adopt {
		return u.adopt(o.Interactive, tell)
	}
	s, pid, err := u.startDetached(ctx, o.Interactive)
	if err != nil {
		tell(report{Error: err.Error(), Exit: ExitStatus(err)}) // the parent cleans up
		return err
	}
	tell(report{Pid: pid})
	debug.FreeOSMemory()
	go func() {
		for range terms {
			_ = u.state.signal(unix.SIGTERM)
		}
	}()
	status, err := reap(pid)
	if err != nil {
		return err
	}
	at("reaped")
	return u.finish(ctx, s, exited(status))
}

// finish records the end of a detached process, after its output. Processes that a further process has left behind in the
// container may go on printing: finish copies their output to the log until the last of them has closed its end.
func (u *execution) finish(ctx context.Context, s *stdio.Detached, e Exit) error {
	defer s.Close()
	s.Settle()
	err := u.end(ctx, e)
	if u.exec != "" {
		s.Drain()
	}
	return err
}

// streams says what the streams of the process are.
func (u *execution) streams(interactive bool) stdio.Options {
	p := u.place()
	return stdio.Options{Dir: p.private, Log: p.logDir(), LogSize: u.c.LogSize, Terminal: u.job.Terminal, Interactive: interactive}
}

// startDetached does the shim's part of starting.
func (u *execution) startDetached(ctx context.Context, interactive bool) (*stdio.Detached, int, error) {
	self, err := Identify(os.Getpid())
	if err != nil {
		return nil, -1, err
	}
	u.state.Monitor = self
	if err := u.place().writeState(u.state); err != nil {
		return nil, -1, err
	}
	at("shim")
	s, err := u.streams(interactive).Open(u.claim.path("console"))
	if err != nil {
		return nil, -1, err
	}
	u.state.Pipes = s.Pipes
	pid, err := u.start(ctx, &s.Ends, s.Console)
	if err != nil {
		return nil, -1, err
	}
	s.Begin()
	return s, pid, nil
}

// reap waits for the process, and for those that it has left to this one.
func reap(pid int) (status int, err error) {
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return -1, fmt.Errorf("wait for container's process: %w", err)
		case got == pid:
			return statusOf(ws), nil
		}
	}
}

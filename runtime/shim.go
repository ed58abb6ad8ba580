package runtime

import (
	"bufio"
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
	"time"

	"distkit/errclass"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/containerd/console"
	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
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
	if err := makeStreams(c.place()); err != nil {
		return -1, u.abandon(ctx, fmt.Errorf("container %s: %w", c.ID, err))
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
func (u *execution) finish(ctx context.Context, s *streams, e Exit) error {
	s.settle()
	err := u.end(ctx, e)
	for ; u.exec != "" && s.n > 0; s.n-- {
		<-s.ended
	}
	s.log.Close()
	return err
}

// startDetached does the shim's part of starting.
func (u *execution) startDetached(ctx context.Context, interactive bool) (*streams, int, error) {
	self, err := Identify(os.Getpid())
	if err != nil {
		return nil, -1, err
	}
	u.state.Monitor = self
	if err := u.place().writeState(u.state); err != nil {
		return nil, -1, err
	}
	at("shim")
	s, err := u.c.openStreams(u.place(), u.job.Terminal, interactive, nil)
	if err != nil {
		return nil, -1, err
	}
	s.log.Begin()
	u.state.Pipes = s.pipes
	opts := &runc.CreateOpts{}
	var term *terminal
	if u.job.Terminal {
		if term, err = newTerminal(u.claim.path("console")); err != nil {
			return nil, -1, err
		}
		defer term.close()
		term.detached = s
		opts.ConsoleSocket = term
	} else {
		opts.IO = s
	}
	pid, err := u.start(ctx, opts, term)
	if err != nil {
		return nil, -1, err
	}
	s.begin()
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

// streams are the standard streams of a detached process: a FIFO in its directory that anybody can
// write its input to, pipes for what it prints, and its log. Pipes have no path, which criu could not restore
// from outside of the container.
type streams struct {
	log         *stdio.Writer
	interactive bool
	outputs     map[string]*os.File // by stream: what the process prints
	theirs      []*os.File          // the process's own ends, in the order stdin, stdout, stderr
	pipes       map[string]string   // what the kernel calls the process's pipes
	input       *os.File            // the FIFO, held open, so that who comes and goes does not end the input
	feed        *os.File            // the pipe that is the process's input, if that is no terminal
	inputEnds   *latch              // closed when feed is to end with what the FIFO holds
	control     *os.File
	master      *os.File      // of a terminal
	over        chan struct{} // closed when the process has ended
	ended       chan struct{}
	n           int
}

// makeStreams makes the FIFOs.
func makeStreams(p place) error {
	for _, name := range []string{"stdin", "control"} {
		name = filepath.Join(p.private, name)
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := unix.Mkfifo(name, 0o600); err != nil {
			return &fs.PathError{Op: "mkfifo", Path: name, Err: err}
		}
	}
	return nil
}

// openStreams opens the streams of a process to be, or, with a state, of one that has lost its monitor.
func (c *Container) openStreams(p place, terminal, interactive bool, old *state) (*streams, error) {
	log, err := stdio.NewWriter(p.logDir(), c.LogSize)
	if err != nil {
		return nil, err
	}
	s := &streams{log: log, interactive: interactive, outputs: map[string]*os.File{}, over: make(chan struct{}), ended: make(chan struct{}, 2)}
	if s.inputEnds, err = newLatch(); err != nil {
		return nil, err
	}
	open := func(name string, flags int) *os.File {
		var f *os.File
		if err == nil {
			f, err = os.OpenFile(name, flags, 0)
		}
		return f
	}
	s.control = open(p.private+"/control", os.O_RDWR|unix.O_NONBLOCK)
	if terminal {
		s.input = open(p.private+"/stdin", os.O_RDWR|unix.O_NONBLOCK)
		return s, err
	}
	stdin := open(os.DevNull, os.O_RDONLY)
	if interactive {
		s.input = open(p.private+"/stdin", os.O_RDWR|unix.O_NONBLOCK)
	}
	if err != nil {
		return nil, err
	}
	if old != nil {
		_ = stdin.Close()
		for name, pipe := range old.Pipes {
			if name == "stdin" {
				s.feed, err = findPipe(*old, pipe, unix.O_WRONLY)
			} else {
				s.outputs[name], err = findPipe(*old, pipe, unix.O_RDONLY)
			}
			if err != nil {
				return nil, err
			}
		}
		return s, nil
	}
	s.pipes = map[string]string{}
	if interactive {
		// Not the FIFO: the process could open that again, and the runtime would make it its own.
		_ = stdin.Close()
		var fd int
		if stdin, fd, err = newPipe(false); err != nil {
			return nil, err
		}
		s.feed = os.NewFile(uintptr(fd), "stdin")
		if s.pipes["stdin"], err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil {
			return nil, err
		}
	}
	s.theirs = []*os.File{stdin}
	for _, name := range []string{"stdout", "stderr"} {
		ours, theirs, err := pipe()
		if err != nil {
			return nil, err
		}
		s.outputs[name], s.theirs = ours, append(s.theirs, theirs)
		if s.pipes[name], err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", theirs.Fd())); err != nil {
			return nil, err
		}
	}
	for _, f := range s.theirs {
		if err := unix.SetNonblock(int(f.Fd()), false); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// pipe makes a pipe for what a process prints. The process has its end for reading too, so that it lives
// on without its monitor.
func pipe() (ours, theirs *os.File, err error) {
	ours, in, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer in.Close()
	theirs, err = os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", in.Fd()), os.O_RDWR, 0)
	return ours, theirs, err
}

// findPipe opens a pipe that a process, or another in its container, has open; nil where none has
// any more. PermissionDenied from a user namespace that is neither theirs nor above it.
func findPipe(s state, pipe string, mode int) (*os.File, error) {
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
			_ = unix.Close(f) // another file has the number by now
		}
	}
	return nil, denied
}

// Set gives the process its streams: s is the runc.IO of its making.
func (s *streams) Set(c *exec.Cmd) {
	c.Stdin, c.Stdout, c.Stderr = s.theirs[0], s.theirs[1], s.theirs[2]
}

// The rest of runc.IO is for others.
func (s *streams) Close() error          { return nil }
func (s *streams) Stdin() io.WriteCloser { return nil }
func (s *streams) Stdout() io.ReadCloser { return nil }
func (s *streams) Stderr() io.ReadCloser { return nil }

// begin copies, once the process has its ends.
func (s *streams) begin() {
	for _, f := range s.theirs {
		_ = f.Close()
	}
	if s.master != nil {
		s.outputs["stdout"] = s.master
		go func() {
			_, _ = io.CopyBuffer(struct{ io.Writer }{s.master}, struct{ io.Reader }{s.input}, make([]byte, 4096))
		}()
	}
	if s.feed != nil {
		go s.pass()
	}
	for stream, f := range s.outputs {
		if f == nil {
			continue
		}
		s.n++
		go func() {
			b := make([]byte, stdio.PieceRoom)
			for {
				n, err := f.Read(b)
				if n > 0 {
					s.log.Write(stream, b[:n])
				}
				if err == nil {
					continue
				}
				// A terminal that no process has open is no end: the next may open it.
				if s.master == nil || !errors.Is(err, unix.EIO) {
					break
				}
				select {
				case <-s.over:
				case <-time.After(50 * time.Millisecond):
					continue
				}
				break
			}
			s.ended <- struct{}{}
		}()
	}
	go s.obey()
}

// pass moves what comes by the FIFO to the process's input, until that is to end or nobody reads it. Then nobody can write
// to the FIFO either.
func (s *streams) pass() {
	f := &flow{from: int(s.input.Fd()), to: int(s.feed.Fd()), stop: s.inputEnds}
	_ = f.run()
	_ = s.input.Close()
	_ = s.feed.Close()
}

// obey does what control says.
func (s *streams) obey() {
	lines := bufio.NewScanner(s.control)
	lines.Buffer(make([]byte, 256), 4096)
	for {
		for lines.Scan() {
			words := strings.Fields(lines.Text())
			switch {
			case len(words) == 3 && words[0] == "resize":
				s.resize(words[1], words[2])
			case len(words) == 1 && words[0] == "eof":
				s.eof()
			}
		}
		if !errors.Is(lines.Err(), bufio.ErrTooLong) {
			return
		}
		lines = bufio.NewScanner(s.control) // of what is no command of ours
		lines.Buffer(make([]byte, 256), 4096)
	}
}

// take makes a terminal's master the process's streams.
func (s *streams) take(f *os.File) error {
	if err := console.ClearONLCR(f.Fd()); err != nil {
		return fmt.Errorf("set console: %w", err)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	_ = f.Close()
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		return fmt.Errorf("receive console: %w", err)
	}
	s.master = os.NewFile(uintptr(fd), "console") // one that can be waited for
	return nil
}

func (s *streams) resize(columns, rows string) {
	c, cerr := strconv.ParseUint(columns, 10, 16)
	r, rerr := strconv.ParseUint(rows, 10, 16)
	if s.master == nil || cerr != nil || rerr != nil {
		return
	}
	if raw, err := s.master.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(c), Row: uint16(r)})
		})
	}
}

// eof ends the input: on a terminal as ^D does.
func (s *streams) eof() {
	switch {
	case s.master != nil:
		_, _ = s.master.Write([]byte{4})
	case s.feed != nil:
		s.inputEnds.close()
	}
}

// settle waits until all output was copied, but at most two seconds: another process may hold the pipe open for longer.
func (s *streams) settle() {
	close(s.over)
	end := time.After(2 * time.Second)
	for s.n > 0 {
		select {
		case <-s.ended:
			s.n--
		case <-end:
			return
		}
	}
}

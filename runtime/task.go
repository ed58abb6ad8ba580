package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"distkit/events"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// live returns the run of a container that has a process. FailedPrecondition where it has none.
func (c *Container) live() (looked, error) {
	l, err := look(c.place())
	// Its process may have begun already, and printed something, before that is written down.
	for end := time.Now().Add(10 * time.Second); err == nil && l.status == Creating && time.Now().Before(end); l, err = look(c.place()) {
		time.Sleep(5 * time.Millisecond)
	}
	if err != nil {
		return l, fmt.Errorf("container %s: %w", c.ID, err)
	}
	if l.status != Running && l.status != Paused {
		return l, failed("container %s is %s", c.ID, l.status)
	}
	return l, nil
}

// unlessEnded is err, or that the container has ended, if it has.
func (c *Container) unlessEnded(what string, err error) error {
	switch l, lerr := c.live(); {
	case lerr != nil:
		return fmt.Errorf("%s: %w", what, lerr)
	case l.state.ending():
		return failed("%s: container %s has just ended", what, c.ID)
	}
	return err
}

// client is the runtime's for a container that somebody else runs.
func (l looked) client() *runc.Runc {
	return &runc.Runc{Command: l.state.Runtime, Root: l.state.RuntimeState, LogFormat: runc.JSON, Setpgid: true}
}

// runtimeError is what a runtime's failure comes down to in one line.
func runtimeError(c *Container, what string, err error) error {
	text := err.Error()
	if i := strings.LastIndex(text, `"msg":"`); i >= 0 {
		text, _, _ = strings.Cut(text[i+len(`"msg":"`):], `"`)
	} else if i := strings.LastIndex(text, `msg="`); i >= 0 {
		if m, uerr := strconv.Unquote(quoted(text[i+len("msg="):])); uerr == nil {
			text = m
		}
	}
	return c.unlessEnded(what, fmt.Errorf("%s container %s: %s", what, c.ID, firstLine(text)))
}

// quoted is the quoted string that s begins with.
func quoted(s string) string {
	q, err := strconv.QuotedPrefix(s)
	if err != nil {
		return s
	}
	return q
}

// Kill sends a signal to a container's process, or to all that runs in it. FailedPrecondition
// where nothing does.
func (c *Container) Kill(ctx context.Context, sig unix.Signal, all bool) error {
	l, err := c.live()
	if err != nil {
		return fmt.Errorf("kill: %w", err)
	}
	if err := c.tend(ctx); err != nil {
		return err
	}
	if all {
		if err := signalAll(func() []int { return c.pids(l) }, sig); err != nil {
			return fmt.Errorf("kill: container %s: %w", c.ID, err)
		}
	}
	if !all {
		if err := l.state.signal(sig); errdefs.IsNotFound(err) {
			return failed("kill: container %s has just ended", c.ID)
		} else if err != nil {
			return fmt.Errorf("kill container %s: %w", c.ID, err)
		}
	}
	if sig == unix.SIGKILL && l.status == Paused {
		thaw(l.state.Cgroups) // nothing dies while it is paused
	}
	return nil
}

// KillProcess sends a signal to one process in a container, by the number that the host knows it
// by, as [Container.Processes] tells it. NotFound where the container has none of that number.
func (c *Container) KillProcess(pid int, sig unix.Signal) error {
	l, err := c.live()
	if err != nil {
		return fmt.Errorf("kill: %w", err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	if err == nil {
		defer unix.Close(fd)
		// The descriptor was opened before: what is in the container now is that process.
		for _, p := range c.pids(l) {
			if p == pid {
				if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
					return fmt.Errorf("kill process %d: %w", pid, err)
				}
				return nil
			}
		}
	}
	return notFound("container %s has no process %d", c.ID, pid)
}

// pids lists what runs in the container.
func (c *Container) pids(l looked) []int {
	if pids := processes(l.state.Cgroups); len(pids) > 0 {
		return pids
	}
	return fellows(l.state.Pid) // it has no cgroup of its own
}

// fellows lists the processes of a process's PID namespace, or it alone where that is this process's too, or may
// not be looked at.
func fellows(pid int) []int {
	namespace := func(pid string) string {
		ns, _ := os.Readlink("/proc/" + pid + "/ns/pid")
		return ns
	}
	pids := []int{pid}
	theirs := namespace(strconv.Itoa(pid))
	if theirs == "" || theirs == namespace("self") {
		return pids
	}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil && n != pid && namespace(e.Name()) == theirs {
			pids = append(pids, n)
		}
	}
	slices.Sort(pids)
	return pids
}

// InContainer is a process in a container.
type InContainer struct {
	Pid     int       `json:"pid"`          // the host's
	Inside  int       `json:"containerPid"` // the container's
	Parent  int       `json:"ppid"`         // the host's
	UID     int       `json:"uid"`          // the host's
	Started time.Time `json:"started"`
	Exec    string    `json:"exec,omitempty"` // the ID of what task exec started
	Command []string  `json:"command"`
}

// Processes lists what runs in a container.
func (c *Container) Processes() ([]InContainer, error) {
	l, err := c.live()
	if err != nil {
		return nil, fmt.Errorf("processes: %w", err)
	}
	execs := map[int]string{}
	for _, x := range c.Execs() {
		if e, err := look(c.execPlace(x)); err == nil && e.status == Running {
			execs[e.state.Pid] = x
		}
	}
	var all []InContainer
	for _, pid := range c.pids(l) {
		p, err := describe(pid)
		if err != nil {
			continue // it has just ended
		}
		p.Exec = execs[pid]
		all = append(all, p)
	}
	return all, nil
}

func describe(pid int) (InContainer, error) {
	p := InContainer{Pid: pid, Inside: pid}
	dir := "/proc/" + strconv.Itoa(pid)
	s, err := statOf(pid)
	if err != nil {
		return p, err
	}
	p.Started = bootTime().Add(time.Duration(s.start) * (time.Second / 100)) // USER_HZ is 100 wherever Go runs
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return p, err
	}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		words := strings.Fields(value)
		if len(words) == 0 {
			continue
		}
		switch key {
		case "PPid":
			p.Parent, _ = strconv.Atoi(words[0])
		case "Uid":
			p.UID, _ = strconv.Atoi(words[0])
		case "NSpid":
			p.Inside, _ = strconv.Atoi(words[len(words)-1])
		case "Name":
			p.Command = []string{"[" + words[0] + "]"}
		}
	}
	if b, err := os.ReadFile(dir + "/cmdline"); err == nil && len(b) > 0 {
		p.Command = strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
	}
	return p, nil
}

func bootTime() time.Time {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(now.Nano())).UTC()
}

// Pause stops all of a container's processes until [Container.Resume].
func (c *Container) Pause(ctx context.Context) error {
	l, err := c.live()
	if err == nil && l.status == Paused {
		err = failed("container %s is paused already", c.ID)
	}
	if err != nil {
		return fmt.Errorf("pause: %w", err)
	}
	if err := c.tend(ctx); err != nil {
		return err
	}
	if err := l.client().Pause(ctx, c.key()); err != nil {
		return runtimeError(c, "pause", err)
	}
	c.log(events.Event{Topic: "/tasks/paused", Pid: l.state.Pid})
	return nil
}

// Resume lets a paused container's processes go on.
func (c *Container) Resume(ctx context.Context) error {
	l, err := c.live()
	if err == nil && l.status != Paused {
		err = failed("container %s is not paused", c.ID)
	}
	if err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	if err := c.tend(ctx); err != nil {
		return err
	}
	if err := l.client().Resume(ctx, c.key()); err != nil {
		return runtimeError(c, "resume", err)
	}
	c.log(events.Event{Topic: "/tasks/resumed", Pid: l.state.Pid})
	return nil
}

// Update changes what the container may use, while it runs.
func (c *Container) Update(ctx context.Context, r *specs.LinuxResources) error {
	l, err := c.live()
	if err != nil {
		return fmt.Errorf("update: %w", err)
	}
	if err := l.client().Update(ctx, c.key(), r); err != nil {
		return runtimeError(c, "update", err)
	}
	return nil
}

// tend gives a container whose monitor was killed another one. Its end is recorded then, and
// its output read.
func (c *Container) tend(ctx context.Context) error { return c.tendTo(ctx, c.place()) }

// tendTo is tend for the container's own process, or for a further one in it.
func (c *Container) tendTo(ctx context.Context, p place) error {
	what, interactive := fmt.Sprintf("container %s", c.ID), c.Interactive
	if p.exec != "" {
		what = c.execName(p.exec)
	}
	lookLost := func() (l looked, lost bool, err error) {
		if l, err = look(p); err != nil {
			return l, false, fmt.Errorf("%s: %w", what, err)
		}
		// What ran in the foreground ends with its run.
		return l, l.state != nil && l.state.Detached && !l.monitored && (l.status == Running || l.status == Paused), nil
	}
	l, lost, err := lookLost()
	if !lost {
		return err
	}
	var lock *os.File
	if p.exec == "" {
		lock, err = c.lock()
	} else {
		lock, err = lockFile(p.store, p.file("lock"), false)
	}
	switch {
	case errdefs.IsUnavailable(err), p.exec != "" && errors.Is(err, fs.ErrNotExist):
		return nil // somebody else does it, or it has been removed
	case err != nil:
		return err
	}
	if l, lost, err = lookLost(); !lost {
		_ = lock.Close()
		return err
	}
	var claim *claim
	if p.exec == "" {
		claim, err = c.claimID(ctx)
	} else {
		interactive = l.state.Interactive
		claim, err = scratch(p.private)
	}
	if err != nil {
		_ = lock.Close()
		return err
	}
	o := order{
		Root: c.set.root, Namespace: c.Namespace, ID: c.ID, Command: l.state.Runtime, State: c.set.state, Exec: p.exec, Interactive: interactive,
		Job: job{Bundle: c.BundleDir(), Terminal: l.state.Terminal}, Run: *l.state, Adopt: true,
	}
	_, err = spawn(o, lock, claim)
	claim.close()
	_ = lock.Close()
	if err != nil && !errdefs.IsPermissionDenied(err) { // who may not read what it prints leaves that to others
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// Wait returns how the container ends, once it has. FailedPrecondition where it was not started.
func (c *Container) Wait(ctx context.Context) (*Exit, error) {
	return c.wait(ctx, c.place(), fmt.Sprintf("container %s", c.ID))
}

// wait waits for the end of the container's own process, or of another one in it. It polls pidfds and needs no inotify
// instance, of which a user has few.
func (c *Container) wait(ctx context.Context, p place, what string) (*Exit, error) {
	done := c.ends(ctx, p, what)
	defer done.close()
	for {
		over, err := done.over()
		if over || err != nil {
			return done.exit, err
		}
		if err := p.untilDeath(ctx); err != nil {
			return nil, err
		}
	}
}

// untilDeath waits until the process or its monitor has ended, but at most a second.
func (p place) untilDeath(ctx context.Context) error {
	const soon = 5 * time.Millisecond // for what the monitor has still to write down
	s, err := p.readState()
	if err != nil {
		return err
	}
	most := soon
	var fds []unix.PollFd
	if s != nil {
		most = time.Second
		for _, of := range []Process{s.Process, s.Monitor} {
			fd, err := of.open()
			if err != nil { // it doesn't run yet, or has ended
				most = soon
				continue
			}
			fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		}
	}
	polled := make(chan struct{})
	go func() {
		defer close(polled)
		_, _ = unix.Poll(fds, int(most.Milliseconds()))
		for _, fd := range fds {
			_ = unix.Close(int(fd.Fd))
		}
	}()
	select {
	case <-ctx.Done():
	case <-polled:
	}
	return ctx.Err()
}

// end looks for the end of a process, also where its directory goes with it.
type end struct {
	over  func() (bool, error)
	close func()
	exit  *Exit
}

func (c *Container) ends(ctx context.Context, p place, what string) *end {
	var file *os.File // who removes the container writes to it before
	ran := false
	e := &end{}
	e.close = func() {
		if file != nil {
			_ = file.Close()
		}
	}
	open := func() {
		if f, err := p.store.Open(p.file("exit.json")); err == nil {
			e.close()
			file = f
		}
	}
	e.over = func() (bool, error) {
		if file == nil {
			open()
		}
		l, err := look(p)
		switch {
		case errdefs.IsNotFound(err):
			if file != nil {
				if e.exit = exitOf(file); e.exit != nil {
					return true, nil
				}
			}
			if ran {
				return true, notFound("%s was removed while it ran", what)
			}
			return true, notFound("no %s", what)
		case err != nil:
			return false, fmt.Errorf("%s: %w", what, err)
		case l.status == Stopped:
			// What is left of it on the host is being removed, which changes nothing in the store.
			for l.monitored && time.Since(l.exit.Exited) < 10*time.Second && ctx.Err() == nil {
				time.Sleep(2 * time.Millisecond)
				now, err := look(p)
				if err != nil || now.status != Stopped {
					break
				}
				l = now
			}
			e.exit = l.exit
			return true, nil
		case l.status == Created:
			return true, failed("%s was not started", what)
		}
		if !ran {
			open() // what was open may be of the run before
			ran = true
		}
		if !l.monitored {
			if err := c.tendTo(ctx, p); err != nil && !errdefs.IsNotFound(err) {
				return false, err
			}
		}
		return false, nil
	}
	return e
}

// Logs are how to read a log.
type Logs struct {
	Follow bool         // until the process ends
	Tail   int          // begin with the last lines, as many as this; all if negative
	Idle   func() error // with Follow: called whenever all that was printed so far was read
}

// Logs calls f with what a detached container has printed, and will.
func (c *Container) Logs(ctx context.Context, o Logs, f func(stdio.Entry) error) error {
	return c.logs(ctx, c.place(), fmt.Sprintf("container %s", c.ID), o, f)
}

func (c *Container) logs(ctx context.Context, p place, what string, o Logs, f func(stdio.Entry) error) error {
	w, err := p.watch(what)
	if err != nil {
		return err
	}
	defer w.Close()
	r, err := stdio.NewReader(p.logDir(), o.Follow && o.Tail == 0)
	if err != nil {
		return fmt.Errorf("log of %s: %w", what, err)
	}
	defer r.Close()
	if l, err := look(p); err == nil && (l.state != nil && !l.state.Detached || l.exit != nil && !l.lost() && !l.exit.Detached) {
		return failed("%s has no log: it runs, or ran, in the foreground", what)
	}
	_ = c.tendTo(ctx, p) // what was kept can be read without a monitor, too
	if o.Tail > 0 {
		last := stdio.NewTail(o.Tail)
		if err := r.Read(last.Add); err != nil {
			return fmt.Errorf("log of %s: %w", what, err)
		}
		if err := last.Each(f); err != nil {
			return err
		}
	}
	if !o.Follow {
		if o.Tail == 0 {
			return nil
		}
		return r.Read(f)
	}
	done := c.ends(ctx, p, what)
	defer done.close()
	return r.Follow(ctx, w, done.over, f, o.Idle)
}

// Execs lists the IDs of the further processes of a container.
func (c *Container) Execs() []string {
	var ids []string
	entries, _ := os.ReadDir(c.path("exec"))
	for _, e := range entries {
		if CheckID(e.Name()) == nil {
			ids = append(ids, e.Name())
		}
	}
	return ids
}

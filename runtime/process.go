package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
)

// Process is a container's own process, or a further one started by [Container.Exec] or [Container.StartExec]. Both
// kinds work alike. A directory in the store keeps the description of the process, its output and its end. A private
// directory on this host keeps the state of its run. The store may have been written by a stranger, so nothing in it
// identifies programs, processes, cgroups or pipes of the host.
type Process struct {
	c       *Container
	exec    string // ID of a further process; "" for the container's own
	name    string // name of its directory in the store's tree
	private string // its directory on this host
}

func (c *Container) proc(exec string) *Process {
	p := &Process{c, exec, c.rel(), claimDir(c.set.state, c.key())}
	if exec != "" {
		p.name, p.private = c.rel("exec", exec), filepath.Join(p.private, "exec-"+exec)
	}
	return p
}

// Process returns a further process of the container, or its own process if exec is "". NotFound: there is no such
// process.
func (c *Container) Process(exec string) (*Process, error) {
	p := c.proc(exec)
	if exec == "" {
		return p, nil
	}
	if err := CheckID(exec); err != nil {
		return nil, err
	}
	if _, err := c.set.tree().Stat(p.name); errors.Is(err, fs.ErrNotExist) {
		return nil, notFound("container %s has no process %s", c.ID, exec)
	}
	return p, nil
}

// String names the process in messages.
func (p *Process) String() string {
	if p.exec != "" {
		return fmt.Sprintf("process %s of container %s", p.exec, p.c.ID)
	}
	return "container " + p.c.ID
}

// dir returns the directory in the store.
func (p *Process) dir() string { return p.c.set.tree().Path(p.name) }

// file returns the name of one of its files in the store's tree.
func (p *Process) file(name string) string { return filepath.Join(p.name, name) }

// logDir returns the directory of the process's log.
func (p *Process) logDir() stdio.Dir { return stdio.Dir{Tree: p.c.set.tree(), Name: p.name} }

// watch watches the directory in the store. NotFound: there is no such process.
func (p *Process) watch() (*stdio.Watcher, error) {
	w, err := stdio.Watch(p.dir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound("no %s", p)
	}
	return w, err
}

// takeLock takes the lock that is needed to run or remove p. If the guard of a killed run is still ending what that has
// started, takeLock waits for it. NotFound: there is no such process. Unavailable: another process holds the lock.
func (p *Process) takeLock() (*os.File, error) {
	c := p.c
	if err := c.set.secure(c.ID); err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	lock, err := p.lockEnding(false)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, notFound("no %s", p)
	case errdefs.IsUnavailable(err):
		return nil, busy("%s is in use: let its run end, or take another ID", p)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	if c.unread || p.exec != "" {
		return lock, nil
	}
	now, err := c.set.read(c.ID)
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	c.Record, c.own = now.Record, now.own
	return lock, nil
}

func (p *Process) lockEnding(create bool) (*os.File, error) {
	for end := time.Now().Add(15 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		l, err := p.look()
		guarded := err == nil && l.state != nil && !l.monitored && !l.state.Detached
		lock, err := lockFile(p.c.set.tree(), p.file("lock"), create)
		if !errdefs.IsUnavailable(err) || !guarded || time.Now().After(end) {
			return lock, err
		}
	}
}

// waitLock waits for the lock of a process that is ending.
func (p *Process) waitLock(ctx context.Context) (*os.File, error) {
	end := time.Now().Add(15 * time.Second)
	for {
		lock, err := p.takeLock()
		if !errdefs.IsUnavailable(err) || time.Now().After(end) {
			return lock, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// live returns the state of a running process. FailedPrecondition: it is not running.
func (p *Process) live() (looked, error) {
	l, err := p.look()
	// A process may have started, and even printed, before that is recorded. So wait for the record.
	for end := time.Now().Add(10 * time.Second); err == nil && l.status == Creating && time.Now().Before(end); l, err = p.look() {
		time.Sleep(5 * time.Millisecond)
	}
	if err != nil {
		return l, fmt.Errorf("%s: %w", p, err)
	}
	if !l.runs() {
		return l, failed("%s is %s", p, l.status)
	}
	return l, nil
}

// attended is live for callers that change something. If the process's monitor was killed, it starts another one first.
// what is the prefix of errors.
func (p *Process) attended(ctx context.Context, what string) (looked, error) {
	l, err := p.live()
	if err == nil {
		err = p.adoptIfLost(ctx)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", what, err)
	}
	return l, err
}

// unlessEnded returns err, or a FailedPrecondition error if the container has ended.
func (c *Container) unlessEnded(what string, err error) error {
	switch l, lerr := c.proc("").live(); {
	case lerr != nil:
		return fmt.Errorf("%s: %w", what, lerr)
	case l.state.ending():
		return failed("%s: container %s has just ended", what, c.ID)
	}
	return err
}

// client returns a client of the runtime that runs the process.
func (l looked) client() *runc.Runc {
	return &runc.Runc{Command: l.state.Runtime, Root: l.state.RuntimeState, LogFormat: runc.JSON, Setpgid: true}
}

// Kill sends a signal to the process. FailedPrecondition: it is not running.
func (p *Process) Kill(ctx context.Context, sig unix.Signal) error {
	l, err := p.attended(ctx, "kill")
	if err != nil {
		return err
	}
	if err := l.state.signal(sig); errdefs.IsNotFound(err) {
		return failed("kill: %s has just ended", p)
	} else if err != nil {
		return fmt.Errorf("kill %s: %w", p, err)
	}
	if p.exec == "" {
		l.thawKilled(sig)
	}
	return nil
}

// KillAll sends a signal to all processes in the container. FailedPrecondition: its own process is not running.
func (c *Container) KillAll(ctx context.Context, sig unix.Signal) error {
	l, err := c.proc("").attended(ctx, "kill")
	if err != nil {
		return err
	}
	l.state.awaitInit(sig)
	if err := signalAll(l.pids, sig); err != nil {
		return fmt.Errorf("kill: container %s: %w", c.ID, err)
	}
	l.thawKilled(sig)
	return nil
}

// Stop stops a container. It sends sig or, if that is 0, the signal that the container's configuration names, or TERM.
// If the container's process has not ended after grace, it kills all processes in the container. A negative grace means
// to wait without limit. Stop succeeds if the container is not running.
func (c *Container) Stop(ctx context.Context, sig unix.Signal, grace time.Duration) error {
	p := c.proc("")
	l, err := p.attended(ctx, "stop")
	switch {
	case err != nil && (l.status == Stopped || l.status == Created):
		return nil
	case err != nil:
		return err
	case sig == 0:
		b, err := openBundleConfig(filepath.Join(p.private, "bundle"), c.BundleDir())
		if err != nil {
			return fmt.Errorf("stop: %w", err)
		}
		sig = spec.StopSignal(b.spec.Annotations)
	}
	ended := func(err error) bool { return errdefs.IsFailedPrecondition(err) || errdefs.IsNotFound(err) }
	if err = p.Kill(ctx, sig); err == nil && l.status == Paused {
		err = c.Resume(ctx)
	}
	if err != nil && !ended(err) {
		return err
	}
	patient, cancel := ctx, func() {}
	if grace >= 0 {
		patient, cancel = context.WithTimeout(ctx, grace)
	}
	defer cancel()
	if _, err = p.Wait(patient); err != nil && patient.Err() != nil && ctx.Err() == nil {
		if err = c.KillAll(ctx, unix.SIGKILL); err == nil || ended(err) {
			_, err = p.Wait(ctx)
		}
	}
	if errdefs.IsNotFound(err) { // it was removed at its end
		return nil
	}
	return err
}

// thawKilled resumes a paused container after a KILL: no process dies while it is paused.
func (l looked) thawKilled(sig unix.Signal) {
	if sig == unix.SIGKILL && l.status == Paused {
		thaw(l.state.Cgroups)
	}
}

// KillPid sends a signal to one process in a container. pid is its number on the host, as in [Container.Processes].
// NotFound: the container has no such process.
func (c *Container) KillPid(pid int, sig unix.Signal) error {
	l, err := c.proc("").live()
	if err != nil {
		return fmt.Errorf("kill: %w", err)
	}
	found := false
	err = signalAll(func() []int {
		found = slices.Contains(l.pids(), pid)
		return slices.DeleteFunc(l.pids(), func(p int) bool { return p != pid })
	}, sig)
	if err == nil && !found {
		return notFound("container %s has no process %d", c.ID, pid)
	}
	return err
}

// pids lists the processes in the container by their numbers on the host.
func (l looked) pids() []int {
	if pids := processes(l.state.Cgroups); len(pids) > 0 {
		return pids
	}
	return namespacePeers(l.state.Pid) // the container has no cgroup of its own
}

// namespacePeers lists the processes that share pid's PID namespace. It returns pid alone if that is our own
// namespace or can't be read.
func namespacePeers(pid int) []int {
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

// adoptIfLost starts a new shim for a running detached process whose shim was killed. The new shim copies the process's
// output and records its end. Processes in the foreground are not adopted, since they end with their run.
func (p *Process) adoptIfLost(ctx context.Context) error {
	lookLost := func() (l looked, lost bool, err error) {
		if l, err = p.look(); err != nil {
			return l, false, fmt.Errorf("%s: %w", p, err)
		}
		return l, l.state != nil && l.state.Detached && !l.monitored && l.runs(), nil
	}
	_, lost, err := lookLost()
	if !lost {
		return err
	}
	lock, err := p.takeLock()
	switch {
	case errdefs.IsUnavailable(err), p.exec != "" && errdefs.IsNotFound(err):
		return nil // another process is adopting it, or it has been removed
	case err != nil:
		return err
	}
	defer lock.Close()
	l, lost, err := lookLost()
	if !lost {
		return err
	}
	claim, err := p.claimHost(ctx)
	if err != nil {
		return err
	}
	defer claim.close()
	u := &execution{Process: p, r: &Runtime{command: l.state.Runtime, state: p.c.set.state}, lock: lock, claim: claim, state: *l.state}
	// A user without access to the process's streams may still kill the process. They leave its adoption to a user with
	// access.
	if _, err = u.spawnShim(true); err != nil && !errdefs.IsPermissionDenied(err) {
		return fmt.Errorf("%s: %w", p, err)
	}
	return nil
}

// Wait waits for the process to end, and returns how it ended. FailedPrecondition: it was not started.
//
// It polls pidfds, and needs no inotify instance, of which a user has few.
func (p *Process) Wait(ctx context.Context) (*Exit, error) {
	done := p.ends(ctx)
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
func (p *Process) untilDeath(ctx context.Context) error {
	const soon = 5 * time.Millisecond // while the monitor still has something to record
	s, err := p.readState()
	if err != nil {
		return err
	}
	most := soon
	var fds []unix.PollFd
	if s != nil {
		most = time.Second
		for _, of := range []HostProcess{s.HostProcess, s.Monitor} {
			fd, err := of.open()
			if err != nil { // the process does not run yet, or has ended
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

// ending watches for the end of a process, even if the process is removed at its end.
type ending struct {
	p    *Process
	ctx  context.Context
	file *os.File // exit.json, kept open because the end is written to it before it is removed
	ran  bool
	exit *Exit
}

func (p *Process) ends(ctx context.Context) *ending { return &ending{p: p, ctx: ctx} }

func (e *ending) close() { _ = e.file.Close() } // nil is none

func (e *ending) open() {
	if f, err := e.p.c.set.tree().Open(e.p.file("exit.json")); err == nil {
		e.close()
		e.file = f
	}
}

// over reports whether the process has ended; e.exit is then valid. If the process's monitor was killed, it starts
// another one.
func (e *ending) over() (bool, error) {
	if e.file == nil {
		e.open()
	}
	l, err := e.p.look()
	switch {
	case errdefs.IsNotFound(err):
		if e.exit = exitOf(e.file); e.exit != nil {
			return true, nil
		}
		if e.ran {
			return true, notFound("%s was removed while it ran", e.p)
		}
		return true, notFound("no %s", e.p)
	case err != nil:
		return false, fmt.Errorf("%s: %w", e.p, err)
	case l.status == Stopped:
		// After the end, the monitor cleans up the host, which changes nothing in the store. Wait for that.
		for l.monitored && time.Since(l.exit.Exited) < 10*time.Second && e.ctx.Err() == nil {
			time.Sleep(2 * time.Millisecond)
			now, err := e.p.look()
			if err != nil || now.status != Stopped {
				break
			}
			l = now
		}
		e.exit = l.exit
		return true, nil
	case l.status == Created:
		return true, failed("%s was not started", e.p)
	}
	if !e.ran {
		e.open() // the open file may be an earlier run's
		e.ran = true
	}
	if !l.monitored {
		if err := e.p.adoptIfLost(e.ctx); err != nil && !errdefs.IsNotFound(err) {
			return false, err
		}
	}
	return false, nil
}

// exitOf reads an open exit.json. It returns nil if f is nil or has no end yet.
func exitOf(f *os.File) *Exit {
	b := make([]byte, 2*exitRoom)
	n, _ := f.ReadAt(b, 0) // fails for nil, and n is 0
	return parseExit(b[:n])
}

// Logs are the options of [Process.Logs].
type Logs struct {
	Follow bool         // continue until the process ends
	Tail   int          // number of last lines to begin with; negative for all
	Idle   func() error // with Follow: called whenever all output so far has been read
}

// Logs calls f with the output of a detached process from its log and, with Follow, with later output.
func (p *Process) Logs(ctx context.Context, o Logs, f func(stdio.Entry) error) error {
	w, err := p.watch()
	if err != nil {
		return err
	}
	defer w.Close()
	r, err := stdio.NewReader(p.logDir(), o.Follow && o.Tail == 0)
	if err != nil {
		return fmt.Errorf("log of %s: %w", p, err)
	}
	defer r.Close()
	if l, err := p.look(); err == nil && (l.state != nil && !l.state.Detached || l.exit != nil && l.exit.Error != errLost && !l.exit.Detached) {
		return failed("%s has no log: it runs, or ran, in the foreground", p)
	}
	_ = p.adoptIfLost(ctx) // on failure, the log can still be read
	if err := p.checkLog(); err != nil {
		return err
	}
	if o.Tail > 0 {
		last := stdio.NewTail(o.Tail)
		if err := r.Read(last.Add); err != nil {
			return fmt.Errorf("log of %s: %w", p, err)
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
	done := p.ends(ctx)
	defer done.close()
	return r.Follow(ctx, w, done.over, f, o.Idle)
}

// Remove removes a process, and returns how its last run has ended; nil if it was never run. Removing the container's
// own process removes the container. FailedPrecondition: the process is running, and force is false. With force it is
// killed.
func (p *Process) Remove(ctx context.Context, force bool) (*Exit, error) {
	c := p.c
	if p.exec == "" {
		defer c.set.Clear(ctx)
	}
	// Open the file first: once the process has ended, its monitor may remove it too.
	exit, _ := c.set.tree().Open(p.file("exit.json"))
	defer exit.Close() // nil if there is none
	gone := func(err error) bool { return errdefs.IsNotFound(err) && exit != nil && (c.RemoveAtEnd || p.exec != "") }
	l, err := p.look()
	switch {
	case gone(err):
		return exitOf(exit), nil
	case err != nil:
		return nil, fmt.Errorf("remove %s: %w", p, err)
	case p.exec == "" && !force && l.status == Created && c.own && c.Owner != nil && c.Owner.Alive() && c.Owner.Pid != os.Getpid():
		return nil, failed("remove %s: process %d is making it: let it, or force the removal", p, c.Owner.Pid)
	case !force && (l.runs() || l.status == Creating):
		return nil, failed("remove %s: it is %s: end it first, or force it", p, l.status)
	case l.runs() && l.state.Status == Running:
		if p.exec == "" {
			err = killAll(ctx, l.state)
		} else if err = l.state.signal(unix.SIGKILL); err == nil {
			err = p.adoptIfLost(ctx)
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("remove %s: %w", p, err)
		}
	}
	lock, err := p.waitLock(ctx)
	switch {
	case gone(err):
		return exitOf(exit), nil
	case err != nil:
		return nil, err
	}
	if p.exec == "" {
		err = c.clear(ctx, nil)
	}
	if err == nil {
		l, err = p.look()
	}
	switch {
	case err != nil:
		_ = lock.Close()
		return nil, fmt.Errorf("remove %s: %w", p, err)
	case p.exec == "":
		return l.exit, c.remove(ctx, lock)
	}
	defer lock.Close()
	return l.exit, p.removeDir(lock)
}

// Remove calls [Process.Remove] for the container's own process.
func (c *Container) Remove(ctx context.Context, force bool) (*Exit, error) {
	return c.proc("").Remove(ctx, force)
}

package runtime

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"distkit/disk"
	"distkit/events"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Runtime is an OCI runtime's program and where it keeps its state.
type Runtime struct {
	command string
	state   string

	cgroupParent string
}

// Find looks for a runtime: a program's name or path, "" for runc, else crun. State is the
// directory for what runs, see [DefaultState]; the runtime's own is in it under the program's
// name, so that `runc --root STATE/runc list` shows the containers. No runtime is NotFound.
func Find(name, state string) (*Runtime, error) {
	names := []string{name}
	if name == "" {
		names = []string{"runc", "crun"}
	}
	for _, n := range names {
		command, err := exec.LookPath(n)
		if err != nil && !strings.Contains(n, "/") {
			// A user's PATH may lack where distributions put runc.
			for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
				if command, err = exec.LookPath(filepath.Join(dir, n)); err == nil {
					break
				}
			}
		}
		if err == nil {
			if command, err = filepath.Abs(command); err != nil {
				return nil, fmt.Errorf("runtime %s: %w", n, err)
			}
			if state, err = filepath.Abs(state); err != nil {
				return nil, fmt.Errorf("state directory: %w", err)
			}
			return &Runtime{command: command, state: state}, nil
		}
	}
	if name == "" {
		return nil, notFound("no OCI runtime: install runc or crun, or name one with --runtime")
	}
	return nil, notFound("runtime %s is not installed", name)
}

// Recorded is the name of a runtime as a [Record] keeps it: a path is absolute. NotFound where there is
// no such runtime.
func Recorded(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	r, err := Find(name, "/")
	if err == nil && strings.Contains(name, "/") {
		name = r.command
	}
	return name, err
}

// client is the runtime's for one run, logging into a file of the claim's.
func (r *Runtime) client(c *claim) *runc.Runc {
	return &runc.Runc{
		Command:   r.command,
		Root:      r.root(),
		Log:       c.path("log"),
		LogFormat: runc.JSON,
		Setpgid:   true, // a terminal's ^C is for us to forward, once
	}
}

func (r *Runtime) root() string { return filepath.Join(r.state, filepath.Base(r.command)) }

// Run runs a container in the foreground and returns the status of its process: what it exited
// with, or 128+n if signal n ended it. The process has pipes that are copied from and to this
// one's standard streams, or those themselves if s says so, or, if the bundle says so, a terminal
// of its own. Output that could not be written is an error, or, where its reader has gone away,
// 128+SIGPIPE in the place of 0. Signals that this
// process gets are forwarded to it; the third INT or TERM that it doesn't heed kills it.
//
// The container is in use (Unavailable) while the process that runs it lives. What one that was
// killed has left, its process too, is removed first, and nothing is left afterwards, nor the
// container itself if it is to be removed at its end.
//
// A bundle without config.json, root filesystem or mount source is NotFound. A command that
// isn't there or can't be executed wraps [ErrCommandNotFound] or [ErrCommandNotExecutable].
func (c *Container) Run(ctx context.Context, r *Runtime, s Streams) (status int, err error) {
	c.set.Clear(ctx)
	lock, err := c.lockStopped(ctx)
	if err != nil {
		return -1, err
	}
	return c.run(ctx, r, lock, c.checkpoint(), s)
}

// Finder finds the runtime for a container that asks for the one of this name, or for any.
type Finder func(name string) (*Runtime, error)

// RunBundle runs a bundle in the foreground, as [Container.Run] does, in a container of its own
// that it removes afterwards. A bundle that is the directory of a container is that container's
// run; if it has no runtime, and the container was to be removed at its end, it is.
func (s *Containers) RunBundle(ctx context.Context, find Finder, rec Record, streams Streams) (status int, err error) {
	rec.RemoveAtEnd = true
	c, r, lock, err := s.forBundle(ctx, find, rec)
	if err != nil {
		return -1, err
	}
	return c.run(ctx, r, lock, c.checkpoint(), streams)
}

// forBundle returns the container to run a bundle in, locked, and its runtime: the one whose directory it
// is, or a new one. What is wrong with the bundle or the runtime is found before a container is made.
func (s *Containers) forBundle(ctx context.Context, find Finder, rec Record) (*Container, *Runtime, *os.File, error) {
	real, err := realBundle(rec.Bundle)
	if err != nil {
		return nil, nil, nil, err
	}
	if filepath.Dir(real) == s.dir() {
		if err := s.secure(filepath.Base(real)); err != nil {
			return nil, nil, nil, err
		}
		id := filepath.Base(real)
		if rec.ID != "" && rec.ID != id {
			return nil, nil, nil, invalid("bundle %s is container %s, not %s", rec.Bundle, id, rec.ID)
		}
		c, lock, err := s.lockDir(ctx, id)
		if err != nil {
			return nil, nil, nil, err
		}
		r, err := find(c.Runtime)
		switch {
		case err == nil:
			return c, r, lock, nil
		case c.RemoveAtEnd && c.never():
			_ = c.remove(ctx, lock)
		default:
			_ = lock.Close()
		}
		return nil, nil, nil, err
	}
	r, err := find(rec.Runtime)
	if err == nil {
		rec.Runtime, err = Recorded(rec.Runtime)
	}
	if err == nil {
		_, err = openBundle(real, rec.Bundle)
	}
	if err != nil {
		return nil, nil, nil, err
	}
	if rec.ID == "" {
		rec.ID = NewID()
	}
	rec.Bundle = real
	self, err := Identify(os.Getpid())
	if err != nil {
		return nil, nil, nil, err
	}
	rec.Owner = &self // killed before it runs, the container is nobody's
	c, lock, err := s.create(ctx, rec, "", nil)
	return c, r, lock, err
}

// closeConfig makes config.json readable for this user alone, whoever wrote it.
func (c *Container) closeConfig() error {
	f, err := c.set.tree().Open(c.rel("config.json"))
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Chmod(0o600)
}

// lockDir returns the container of a directory in the store, locked, which has no process. A directory that somebody
// else has made, without a record, becomes one.
func (s *Containers) lockDir(ctx context.Context, id string) (*Container, *os.File, error) {
	c, err := s.Get(id)
	if err == nil {
		lock, err := c.lockStopped(ctx)
		return c, lock, err
	}
	if !errdefs.IsNotFound(err) {
		return nil, nil, err
	}
	lock, err := lockFile(s.tree(), filepath.Join("containers", s.namespace, id, "lock"), true)
	if err != nil {
		return nil, nil, fmt.Errorf("container %s: %w", id, err)
	}
	c, err = s.read(id)
	if errdefs.IsNotFound(err) {
		c = &Container{Record: Record{ID: id, Namespace: s.namespace, Created: time.Now().UTC()}, dir: filepath.Join(s.dir(), id), set: s, own: true}
		err = c.write()
	}
	if err != nil {
		_ = lock.Close()
		return nil, nil, err
	}
	return c, lock, nil
}

// lock makes this process the one that runs or removes the container.
func (c *Container) lock() (*os.File, error) {
	if err := c.set.secure(c.ID); err != nil {
		return nil, fmt.Errorf("container %s: %w", c.ID, err)
	}
	lock, err := c.lockEnding(false)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, notFound("no container %s", c.ID)
	case errdefs.IsUnavailable(err):
		return nil, busy("container %s is in use: let its run end, or take another ID", c.ID)
	case err != nil:
		return nil, fmt.Errorf("container %s: %w", c.ID, err)
	}
	if c.unread {
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

// lockStopped locks a container that is to be started. A container that runs is FailedPrecondition. If its monitor was
// killed, it gets a new one; it is never killed. If it has just ended, lockStopped waits for its monitor.
func (c *Container) lockStopped(ctx context.Context) (*os.File, error) {
	lock, err := c.lock()
	l, lerr := look(c.place())
	switch {
	case lerr != nil || c.runIsGone():
		return lock, err
	case err == nil && l.state != nil && !l.state.Detached:
		return lock, nil // of a run in the foreground that was killed with its guard: its process is to end
	case l.status == Running || l.status == Paused:
		if err == nil {
			_ = lock.Close()
			_ = c.tend(ctx)
		}
		return nil, failed("container %s runs", c.ID)
	case errdefs.IsUnavailable(err) && l.status == Stopped:
		return c.waitLock(ctx)
	}
	return lock, err
}

// CheckpointDir is the directory for the stored state of the container's processes.
func (c *Container) CheckpointDir() string { return c.path("checkpoint") }

// checkpoint returns the directory of the stored state that the next run restores, or "" if that run starts anew.
func (c *Container) checkpoint() string {
	if c.Stored && c.never() {
		return c.CheckpointDir()
	}
	return ""
}

// run runs a container; images is where the state of its processes is, if that was stored.
func (c *Container) run(ctx context.Context, r *Runtime, lock *os.File, images string, s Streams) (status int, err error) {
	signals := catchSignals()
	u, err := c.begin(ctx, r, lock, false)
	if err != nil {
		return -1, err
	}
	u.images = images
	return u.foreground(ctx, signals, s)
}

// foreground runs the process and returns its status. Its streams are those that s says, or a terminal.
func (u *execution) foreground(ctx context.Context, signals <-chan os.Signal, s Streams) (status int, err error) {
	if err := u.startGuard(); err != nil {
		return -1, u.abandon(ctx, err)
	}
	streams := stdio.Inherit()
	switch {
	case u.job.Terminal:
		streams, err = stdio.Terminal(u.claim.path("console"))
	case s != Inherited:
		streams, err = stdio.Pipe()
	}
	if err != nil {
		return -1, u.abandon(ctx, err)
	}
	pid, err := u.start(ctx, &streams.Ends, streams.Console)
	if err == nil {
		streams.Begin()
		status, err = wait(pid, signals, streams.Resize)
	}
	if err != nil {
		err = u.abandon(ctx, err)
		_, _ = streams.Finish(signals, 0) // the runtime's message
		return -1, err
	}
	err = u.end(ctx, exited(status))
	status, ferr := streams.Finish(signals, status)
	return status, errors.Join(err, ferr)
}

func exited(status int) Exit { return Exit{Status: &status, Exited: time.Now().UTC()} }

// job is what must be known of a bundle to run it.
type job struct {
	Bundle   string `json:"bundle"`
	Command  string `json:"command"`
	Terminal bool   `json:"terminal"`
	Simple   bool   `json:"simple"` // removeEnded can remove it
}

// execution is one run of a container: the locks it holds, and what it has to do.
type execution struct {
	c       *Container
	exec    string         // the ID of a further process in the container, "" for its own
	process *specs.Process // that process
	images  string         // what to restore the container from
	r       *Runtime
	lock    *os.File
	claim   *claim
	job     job
	state   state
	guard   *guard // of a run in the foreground
}

func (u *execution) place() place {
	if u.exec != "" {
		return u.c.execPlace(u.exec)
	}
	return u.c.place()
}

// begin takes what a run needs: the runtime's ID, a clean table, the mounted root filesystem.
// It owns the lock from here on.
func (c *Container) begin(ctx context.Context, r *Runtime, lock *os.File, detached bool) (u *execution, err error) {
	r = &Runtime{command: r.command, state: c.set.state, cgroupParent: r.cgroupParent}
	u = &execution{c: c, r: r, lock: lock}
	if err := c.CheckOwn(); err != nil {
		_ = lock.Close()
		return nil, err
	}
	u.claim, err = c.claimID(ctx)
	if err != nil {
		if c.RemoveAtEnd && c.never() {
			_ = c.delete(lock)
		} else {
			_ = lock.Close()
		}
		return nil, err
	}
	if err = c.clear(ctx, u.claim); err == nil {
		err = r.reclaim(ctx, r.client(u.claim), u.claim, c.key())
	}
	if err != nil {
		u.claim.close()
		_ = lock.Close()
		return nil, err
	}
	at("claimed")
	err = func() error {
		if err := removeAll(c.set.tree(), c.rel("exec")); err != nil { // of the last run
			return err
		}
		if err := c.set.makeDir(c.rel("exec")); err != nil {
			return err
		}
		self, err := Identify(os.Getpid())
		if err != nil {
			return err
		}
		u.state = state{Status: Creating, Runtime: r.command, RuntimeState: r.root(), Detached: detached, Monitor: self}
		// The end of the run before counts until this one begins: state.json goes first.
		if err := c.place().writeState(u.state); err != nil {
			return err
		}
		at("creating")
		if err := c.place().blankExit(); err != nil {
			return err
		}
		at("blank")
		if err := c.connect(ctx); err != nil {
			return fmt.Errorf("network: %w", err)
		}
		if c.Snapshot != nil {
			if err := os.Mkdir(c.path("rootfs"), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			if err := c.set.snapshots.Mount(ctx, *c.Snapshot, c.path("rootfs")); err != nil {
				return err
			}
		}
		at("mounted")
		b, err := openBundle(c.BundleDir(), c.BundleDir())
		if err == nil && c.Bundle == "" {
			err = c.closeConfig()
		}
		if err == nil {
			err = c.letSearch(&b.spec)
		}
		if err != nil {
			return err
		}
		cgroups, err := placeCgroups(c.key(), r, detached, controllers(b.spec.Linux))
		if err != nil {
			return err
		}
		u.job = b.job(r)
		if u.job.Bundle, err = b.private(u.claim.path("bundle"), cgroups.path); err != nil {
			return err
		}
		u.state.Terminal, u.state.Cgroups, u.state.Monitors = u.job.Terminal, cgroups.dirs, cgroups.monitors
		return c.place().writeState(u.state) // what is in these cgroups from now on is the container's
	}()
	if err != nil {
		return nil, u.abandon(ctx, fmt.Errorf("container %s: %w", c.ID, err))
	}
	return u, nil
}

// at is where tests kill.
var at = func(string) {}

// start has the runtime make the process, which becomes this process's child.
func (u *execution) start(ctx context.Context, streams *stdio.Ends, console *stdio.Console) (pid int, err error) {
	// The container's process becomes our child when the runtime that made it ends.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return -1, fmt.Errorf("become subreaper: %w", err)
	}
	client := u.r.client(u.claim)
	opts := &runc.CreateOpts{IO: streams, PidFile: u.claim.path("pid"), Detach: true}
	if console != nil {
		opts.ConsoleSocket = console
	}
	topic := "/tasks/start"
	if u.exec != "" {
		topic = "/tasks/exec-started"
		err = u.r.startExec(ctx, client, u.c.key(), u.process, opts, console)
	} else if u.images != "" {
		err = u.r.restore(ctx, client, u.c.key(), u, opts, console)
	} else {
		err = u.r.start(ctx, client, u.c.key(), u.job.Bundle, opts, console)
	}
	if err != nil {
		return -1, u.r.startError(u.job, u.claim, err)
	}
	at("started")
	if pid, err = readPid(u.claim.path("pid")); err != nil {
		return -1, err
	}
	if u.state.Process, err = Identify(pid); err != nil {
		return -1, err
	}
	if s, err := statOf(pid); err == nil && u.exec != "" {
		u.state.Session = s.session
	}
	u.state.Status, u.state.Started, u.state.Cgroups = Running, time.Now().UTC(), existing(u.state.Cgroups)
	if err := u.place().writeState(u.state); err != nil {
		return -1, err
	}
	u.c.log(events.Event{Topic: topic, Exec: u.exec, Pid: pid})
	at("running")
	return pid, nil
}

// abandon undoes what led to no run, and returns err, the cause.
func (u *execution) abandon(ctx context.Context, err error) error {
	if u.exec != "" {
		if u.guard != nil { // until the process is dead, its guard is to see to that if this one is killed
			_ = u.killStarted()
		}
		u.guard.end()
		_ = removeExecDir(u.place())
		if u.claim != nil {
			u.claim.release()
		}
		_ = u.lock.Close()
		if errors.Is(err, ErrCommandNotFound) || errors.Is(err, ErrCommandNotExecutable) {
			return err
		}
		return u.c.unlessEnded("exec", err)
	}
	rerr := u.r.remove(ctx, u.r.client(u.claim), u.c.key())
	removeCgroups(u.state.Cgroups)
	_ = u.c.unmountSnapshot()
	u.c.disconnect(ctx)
	_ = os.Remove(u.c.path("exit.json")) // before the state goes: a blank one without means a lost run
	if uerr := u.leave(ctx); rerr == nil {
		rerr = uerr
	}
	if err == nil {
		err = rerr
	}
	return err
}

func (c *Container) unmountSnapshot() error {
	if c.Snapshot == nil && !c.unread {
		return nil
	}
	return c.unmount()
}

// claimID takes the right to the container's ID on this host.
func (c *Container) claimID(ctx context.Context) (*claim, error) {
	if err := PrivateDir(c.set.state); err != nil {
		return nil, err
	}
	id, err := identify(c.dir)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.ID, err)
	}
	return claimID(ctx, c.set.state, c.key(), id)
}

// disconnect takes the container's network down. One that is removed at its end takes it away then; one that
// can't be taken down is up until the next run, or until it is removed.
func (c *Container) disconnect(ctx context.Context) {
	if path := c.network(); path != "" && !c.RemoveAtEnd {
		_ = c.set.networks.Down(ctx, path)
	}
}

// connect takes the container's network up, and keeps in the record what makes it again after a boot.
func (c *Container) connect(ctx context.Context) error {
	path := c.network()
	if path == "" {
		return nil
	}
	if err := c.set.networks.Up(ctx, path, c.Connection); err != nil || c.RemoveAtEnd {
		return err
	}
	now, err := c.set.networks.Connection(path)
	if err != nil || now == nil || reflect.DeepEqual(now, c.Connection) {
		return err
	}
	return c.change(func(r *Record) error {
		r.Connection = now
		return nil
	})
}

// end records the end of a run, and removes what is left of it on the host.
func (u *execution) end(ctx context.Context, e Exit) error {
	var errs []error
	at("ended")
	if u.exec != "" {
		return u.endExec(e)
	}
	e.OOMKilled = oomKills(u.state.Cgroups) > 0
	// First of all: whoever is killed in what follows does not lose it.
	errs = append(errs, u.c.record(u.state, e))
	at("recorded")
	if !u.r.removeEnded(u.job, u.c.key(), u.state.Cgroups) {
		errs = append(errs, u.r.remove(ctx, u.r.client(u.claim), u.c.key()))
		removeCgroups(u.state.Cgroups)
	}
	at("removed")
	_ = u.c.unmountSnapshot()
	u.c.disconnect(ctx)
	at("unmounted")
	errs = append(errs, u.leave(ctx))
	return errors.Join(errs...)
}

// record writes down the end of a run.
func (c *Container) record(s state, e Exit) error {
	err := c.place().writeExit(e.of(s))
	if e.OOMKilled {
		c.log(events.Event{Topic: "/tasks/oom", Pid: s.Pid})
	}
	c.log(events.Event{Topic: "/tasks/exit", Pid: s.Pid, Status: e.Status})
	if err != nil {
		return fmt.Errorf("container %s: record the exit: %w", c.ID, err)
	}
	return nil
}

// leave gives the locks back, and removes the container if it is to be.
func (u *execution) leave(ctx context.Context) error {
	u.guard.end()
	u.claim.release()
	if !u.c.RemoveAtEnd {
		// A guard that has been killed may close its descriptors of the lock a little later.
		disk.Unlock(u.lock)
		return u.lock.Close()
	}
	return u.c.remove(ctx, u.lock)
}

// start makes and starts a container: at once where it can. A terminal must have its size
// before the process looks at it. And only runc leaves a process that ends at once to be waited
// for; others must have ended themselves before the container's process begins.
func (r *Runtime) start(ctx context.Context, client *runc.Runc, id, dir string, opts *runc.CreateOpts, console *stdio.Console) error {
	if console == nil && filepath.Base(r.command) == "runc" {
		_, err := client.Run(ctx, id, dir, opts)
		return err
	}
	opts.Detach = false
	if err := client.Create(ctx, id, dir, opts); err != nil {
		return err
	}
	if console != nil {
		if err := console.Receive(); err != nil {
			return err
		}
	}
	return client.Start(ctx, id)
}

// reclaim removes what a run of the same ID has left that did not live to do so, after the
// runtime that it may have started has ended.
func (r *Runtime) reclaim(ctx context.Context, client *runc.Runc, c *claim, id string) error {
	quiet := c.quiet()
	_, err := os.Lstat(filepath.Join(r.root(), id))
	if err == nil {
		err = r.remove(ctx, client, id)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("container %s: %w", id, err)
	}
	if !quiet && !c.quiet() {
		return busy("container %s: a runtime that an earlier run started still works on it", id)
	}
	for _, name := range []string{"pid", "log"} {
		_ = os.Remove(c.path(name))
	}
	return nil
}

// remove deletes a container in whatever state it is. One that isn't there is removed.
func (r *Runtime) remove(ctx context.Context, client *runc.Runc, id string) error {
	err := client.Delete(ctx, id, &runc.DeleteOpts{Force: true})
	if err == nil {
		return nil
	}
	dir := filepath.Join(r.root(), id)
	if _, serr := os.Lstat(dir); errors.Is(serr, fs.ErrNotExist) {
		return nil
	}
	// A runtime killed between making its directory and writing its state refuses it for ever.
	if os.Remove(filepath.Join(dir, "exec.fifo")); os.Remove(dir) == nil {
		return nil
	}
	return fmt.Errorf("remove container %s: %s", id, firstLine(err.Error()))
}

// removeEnded removes a container whose process has ended, as `runc delete` does, without
// starting runc once more, which takes a quarter of the time of a short run. It does so only
// where removing directories is all there is to do: runc's state, the container's cgroups, and a
// PID namespace that the kernel has emptied. Otherwise, and where anything is unexpected, it
// leaves the rest to remove and returns false.
func (r *Runtime) removeEnded(j job, id string, cgroups []string) bool {
	if !j.Simple || len(cgroups) == 0 {
		return false
	}
	dir := filepath.Join(r.root(), id)
	for _, d := range cgroups {
		if err := unix.Rmdir(d); err != nil && err != unix.ENOENT {
			return false
		}
	}
	return os.RemoveAll(dir) == nil
}

// Streams says what the standard streams of a process in the foreground are.
type Streams int

const (
	// Piped gives the process pipes, see [stdio.Pipe].
	Piped Streams = iota
	// Inherited gives the process this process's own standard streams, see [stdio.Inherit].
	Inherited
)

// job tells what is to be done with a bundle.
func (b *bundle) job(r *Runtime) job {
	l := b.spec.Linux
	return job{
		Bundle: b.dir, Command: b.spec.Process.Args[0], Terminal: b.spec.Process.Terminal,
		Simple: filepath.Base(r.command) == "runc" && b.spec.Hooks == nil && l != nil && l.IntelRdt == nil &&
			slices.ContainsFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace && n.Path == "" }),
	}
}

// startError is what the runtime logged of its failure.
func (r *Runtime) startError(j job, c *claim, err error) error {
	message := ""
	if f, ferr := os.Open(c.path("log")); ferr == nil {
		defer f.Close()
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, spec.MaxDocument)
		for lines.Scan() {
			var entry struct{ Level, Msg string }
			if json.Unmarshal(lines.Bytes(), &entry) == nil && entry.Level == "error" {
				message = entry.Msg
			}
		}
	}
	if message == "" {
		return fmt.Errorf("%s: %w", filepath.Base(r.command), err)
	}
	told := func(err error) error {
		if j.Terminal {
			return err
		}
		return fmt.Errorf("%w%w", err, errTold)
	}
	message = firstLine(message)
	for _, p := range []string{"runc run failed: ", "runc create failed: ", "exec failed: "} {
		message = strings.TrimPrefix(message, p)
	}
	message = strings.TrimPrefix(message, "unable to start container process: ")
	// The runtimes' words are all there is to tell these by; docker does the same.
	command := strings.HasPrefix(message, "exec: ") || strings.HasPrefix(message, "exec "+strconv.Quote(j.Command)) ||
		strings.HasPrefix(message, "executable file") || strings.HasPrefix(message, "open executable")
	switch {
	case command && (strings.Contains(message, "not found") || strings.Contains(strings.ToLower(message), "no such file")):
		return told(commandError(j.Command, ErrCommandNotFound))
	case command && (strings.Contains(strings.ToLower(message), "permission denied") || strings.Contains(message, "not permitted") || strings.Contains(message, "is a directory")):
		return told(commandError(j.Command, ErrCommandNotExecutable))
	}
	return told(fmt.Errorf("%s: %s", filepath.Base(r.command), message))
}

// errTold marks an error that the runtime has written to the standard error that it shares
// with the container.
var errTold = told{}

type told struct{}

func (told) Error() string { return "" }

// Told tells whether standard error has the message of an error of [Container.Run] already: the
// runtime writes its own there, since the container inherits it.
func Told(err error) bool { return errors.Is(err, errTold) }

func firstLine(s string) string {
	s, _, _ = strings.Cut(strings.TrimSpace(s), "\n")
	return s
}

func readPid(name string) (int, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, fmt.Errorf("read pid: %w", err)
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("read pid: %q is none", b)
	}
	return pid, nil
}

// forwarded are the signals that are passed on: all that ask a process for something, but for
// those of job control, which concern this process, and those that the parent had ignored.
func forwarded() []os.Signal {
	all := []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGWINCH}
	for s := syscall.Signal(34); s <= 64; s++ {
		all = append(all, s)
	}
	var out []os.Signal
	for _, s := range all {
		if !signal.Ignored(s) {
			out = append(out, s)
		}
	}
	return out
}

// wait forwards signals to a child until it ends, but for changes of the terminal's size if resize returns true. It waits for
// what the child leaves behind, too.
func wait(pid int, signals <-chan os.Signal, resize func() bool) (int, error) {
	type end struct {
		status int
		err    error
	}
	// The descriptor names this very process: until it is waited for its number isn't reused,
	// and after that the descriptor refuses signals.
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open container's process: %w", err)
	}
	defer unix.Close(fd)
	ended := make(chan end, 1)
	go func() {
		var e end
		e.status, e.err = reap(pid)
		ended <- e
	}()
	unheeded := 0
	for {
		select {
		case e := <-ended:
			return e.status, e.err
		case s := <-signals:
			sig := s.(syscall.Signal)
			if sig == unix.SIGWINCH && resize() {
				continue
			}
			if sig == unix.SIGTERM && abandoned() {
				sig = unix.SIGKILL
			}
			// The kernel keeps a namespace's first process from signals it doesn't catch.
			if (sig == unix.SIGINT || sig == unix.SIGTERM) && !catches(pid, sig) {
				if unheeded++; unheeded == 3 {
					sig = unix.SIGKILL
				}
			}
			_ = unix.PidfdSendSignal(fd, sig, nil, 0)
		}
	}
}

// parent is the process that started this one. dist-userns tells its own ID to what it executes, since it may
// have been killed before this program began.
var parent = func() int {
	if pid, err := strconv.Atoi(os.Getenv("DIST_PARENT")); err == nil {
		return pid
	}
	return os.Getppid()
}()

// catchSignals delivers the signals that are passed on. They are caught until this process exits with the status of what it
// ran, since one more of them must not change that status. If the parent was killed before this process caught
// them, the TERM of that may be lost, and is delivered again.
func catchSignals() chan os.Signal {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, forwarded()...)
	if abandoned() {
		signals <- unix.SIGTERM
	}
	return signals
}

// endsWithParent reports whether the kernel was asked to signal this process when its parent dies, as dist-userns
// asks. It is an attribute of the first thread, on which packages are initialised.
var endsWithParent = func() bool {
	sig := int32(0)
	err := unix.Prctl(unix.PR_GET_PDEATHSIG, uintptr(unsafe.Pointer(&sig)), 0, 0, 0)
	return err == nil && sig != 0
}()

// abandoned reports whether the parent has been killed, and this process was to end with it. Whoever killed it
// meant this process: there is no other way to reach it.
func abandoned() bool { return endsWithParent && os.Getppid() != parent }

// catches reports whether a process handles a signal, or takes it from those that it blocks.
func catches(pid int, sig syscall.Signal) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true
	}
	for _, set := range []string{"\nSigCgt:", "\nSigBlk:"} {
		_, rest, _ := strings.Cut(string(b), set)
		mask, err := strconv.ParseUint(strings.TrimSpace(firstLine(rest)), 16, 64)
		if err != nil || mask&(1<<(sig-1)) != 0 {
			return true
		}
	}
	return false
}

// ExitStatus tells docker's status for an error of [Container.Run]: 127 and 126 for the
// command's, else 125.
func ExitStatus(err error) int {
	switch {
	case errors.Is(err, ErrCommandNotFound):
		return 127
	case errors.Is(err, ErrCommandNotExecutable):
		return 126
	}
	return 125
}

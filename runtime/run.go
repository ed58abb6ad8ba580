package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"distkit/disk"
	"distkit/events"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Run runs a container in the foreground and returns the status of its process, or 128+n if signal n killed it. The
// process gets a terminal if the bundle asks for one. Otherwise it gets pipes to and from this process's standard
// streams, or these themselves, as s selects. Signals are forwarded to it; the third INT or TERM that it ignores kills
// it. If its output can't be written, that is an error, but if the reader is gone, a status 0 becomes 128+SIGPIPE.
//
// While the process that runs it lives, the container is in use (Unavailable). If a run was killed, the next one first
// removes what is left of it, including its process. After a run nothing is left on the host. The container is removed
// too, if it is to be removed at its end.
//
// NotFound: the bundle has no config.json or root filesystem, or the source of a mount is missing. An error for a
// command that does not exist or can't be executed wraps [ErrCommandNotFound] or [ErrCommandNotExecutable].
func (c *Container) Run(ctx context.Context, r *Runtime, s Streams) (status int, err error) {
	u, err := c.lockAndBegin(ctx, r, false)
	if err != nil {
		return -1, err
	}
	return u.foreground(ctx, s)
}

// Start runs a container detached. A shim, which is another process of this program, keeps the standard streams,
// records the end, and then cleans up as [Container.Run] does. Start returns once the container's process runs. Its
// errors are those of Run.
//
// The program's main must call [Shim] first.
func (c *Container) Start(ctx context.Context, r *Runtime) (pid int, err error) {
	u, err := c.lockAndBegin(ctx, r, true)
	if err != nil {
		return -1, err
	}
	return u.detach(ctx)
}

func (c *Container) lockAndBegin(ctx context.Context, r *Runtime, detached bool) (*execution, error) {
	c.set.Clear(ctx)
	lock, err := c.lockStopped(ctx)
	if err != nil {
		return nil, err
	}
	return c.begin(ctx, r, lock, detached)
}

// Finder returns the runtime of that name; "" means any.
type Finder func(name string) (*Runtime, error)

// RunBundle runs a bundle in the foreground like [Container.Run], in a new container that is removed afterwards. If the
// bundle is the directory of a container, that container is run. If it was to be removed at its end, it is removed even
// if there is no runtime.
func (s *Containers) RunBundle(ctx context.Context, find Finder, rec Record, streams Streams) (status int, err error) {
	rec.RemoveAtEnd = true
	c, r, lock, err := s.forBundle(ctx, find, rec)
	if err != nil {
		return -1, err
	}
	u, err := c.begin(ctx, r, lock, false)
	if err != nil {
		return -1, err
	}
	return u.foreground(ctx, streams)
}

// StartBundle makes a container for a bundle and starts it. If the bundle is the directory of a container, that
// container is started.
func (s *Containers) StartBundle(ctx context.Context, find Finder, rec Record) (c *Container, pid int, err error) {
	c, r, lock, err := s.forBundle(ctx, find, rec)
	if err != nil {
		return nil, -1, err
	}
	u, err := c.begin(ctx, r, lock, true)
	if err == nil {
		pid, err = u.detach(ctx)
	}
	if err != nil && c.Bundle != "" {
		_, _ = c.Remove(ctx, false) // the container was made only for this
	}
	return c, pid, err
}

// forBundle returns a locked container to run a bundle in, and its runtime. The container is the one whose directory
// the bundle is, or else a new one. Errors of the bundle or the runtime are found before a container is made.
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
		case c.RemoveAtEnd && c.neverRun():
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
	rec.Owner = &self // if this process is killed before it runs the container, the container is abandoned
	c, lock, err := s.create(ctx, rec, "", nil)
	return c, r, lock, err
}

// openBundle opens the container's bundle and checks it.
func (c *Container) openBundle() (*bundle, error) {
	b, err := c.openConfig()
	if err != nil {
		return nil, err
	}
	return b, b.check(c.BundleDir())
}

// openConfig reads the container's configuration. If it is in the container's directory, that must be the one that the
// record is sealed for, and the file is made readable for this user alone, whoever wrote it.
func (c *Container) openConfig() (*bundle, error) {
	if c.Bundle != "" {
		return openBundleConfig(c.Bundle, c.Bundle)
	}
	d, err := c.OpenDir()
	if err != nil {
		return nil, err
	}
	defer d.Close()
	b, err := openBundleConfig(procPath(d), c.dir)
	if err != nil {
		return nil, err
	}
	f, err := disk.Tree(b.dir).Open("config.json")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b.dir = c.dir
	return b, f.Chmod(0o600)
}

// lockDir returns a container without a process, given by its directory in the store, and locks it. If the directory
// has no record because something else has made it, lockDir makes one.
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

// lockStopped locks a container that is to be started. FailedPrecondition: the container is running. If its monitor was
// killed, it gets a new one, but is not killed. If it has just ended, lockStopped waits for its monitor.
func (c *Container) lockStopped(ctx context.Context) (*os.File, error) {
	p := c.proc("")
	lock, err := p.takeLock()
	l, lerr := p.look()
	switch {
	case lerr != nil || c.runIsGone():
		return lock, err
	case err == nil && l.state != nil && !l.state.Detached:
		return lock, nil // a killed foreground run, whose guard was killed too: its process is to be ended
	case l.runs():
		if err == nil {
			_ = lock.Close()
			_ = p.adoptIfLost(ctx)
		}
		return nil, failed("container %s runs", c.ID)
	case errdefs.IsUnavailable(err) && l.status == Stopped:
		return p.waitLock(ctx)
	}
	return lock, err
}

// CheckpointDir returns the directory for the stored state of the container's processes.
func (c *Container) CheckpointDir() string { return c.path("checkpoint") }

func exited(status int) Exit { return Exit{Status: &status, Exited: time.Now().UTC()} }

// execution is one run of a process: the locks held for it, and what is to be run.
type execution struct {
	*Process
	r         *Runtime
	lock      *os.File // lock of its directory in the store
	claim     *claim   // lock of its directory on this host
	state     state    // as written to state.json
	job       job
	images    string         // directory to restore the container from; "" to start it
	config    *specs.Process // configuration of a further process
	guard     *guard         // guard of a foreground run
	signals   chan os.Signal // signals that this process has received since a foreground run began
	sockets   []*os.File     // sockets from a supervisor, for a container in the foreground
	socketEnv []string       // variables that describe the sockets to the container
	joined    []joined       // namespaces of other containers, until they are mounted
	mounts    *privateMounts // mount namespace for the runtime; nil for this process's
}

// job is the part of a bundle that matters for running it.
type job struct {
	Bundle  string `json:"bundle"`
	Command string `json:"command"`
	Simple  bool   `json:"simple"` // removeEnded can remove the container
}

// begin prepares a container's run: it takes the ID on this host, removes what an earlier run has left, and sets up
// network, root filesystem and cgroups. It takes over the lock. After an error it has undone what it did.
func (c *Container) begin(ctx context.Context, r *Runtime, lock *os.File, detached bool) (_ *execution, err error) {
	u := &execution{Process: c.proc(""), r: &Runtime{r.command, c.set.state, r.cgroupParent, r.log, r.output}, lock: lock}
	if c.restored || c.Stored && c.neverRun() {
		u.images = c.CheckpointDir()
	}
	if u.sockets, u.socketEnv, err = takeSockets(); detached {
		u.sockets, u.socketEnv = nil, nil // closed when this program exits
	} else {
		u.signals = catchSignals()
	}
	if err == nil {
		err = c.CheckOwn()
	}
	if err == nil && u.images != "" {
		if err = CheckCriu(ctx); err != nil {
			err = fmt.Errorf("restore container %s: %w", c.ID, err)
		}
	}
	if err == nil {
		u.claim, err = u.claimHost(ctx)
	}
	if err != nil && c.own && c.RemoveAtEnd && c.neverRun() { // the run has left nothing to clear up
		if errdefs.IsUnavailable(err) {
			c.Network = "" // the network belongs to the current owner of the ID
		}
		_ = c.remove(ctx, lock)
		return nil, err
	}
	if err == nil {
		err = c.clear(ctx, u.claim)
	}
	if err == nil {
		err = u.r.reclaim(ctx, u.claim, c.key())
	}
	if err != nil {
		u.claim.close()
		_ = lock.Close()
		return nil, err
	}
	atStep("claimed")
	if err := u.prepare(ctx, detached); err != nil {
		return nil, u.abandon(ctx, fmt.Errorf("container %s: %w", c.ID, err))
	}
	return u, nil
}

// prepare sets up everything that the container needs.
func (u *execution) prepare(ctx context.Context, detached bool) error {
	c := u.c
	if err := removeAll(c.set.tree(), c.rel("exec")); err != nil { // left by the last run
		return err
	}
	if err := c.set.makeDir(c.rel("exec")); err != nil {
		return err
	}
	if err := u.enter(state{Detached: detached, Interactive: c.Interactive, Log: u.r.log}); err != nil {
		return err
	}
	atStep("blank")
	if err := c.connect(ctx); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	users, err := u.mapUsers(ctx)
	var ns *os.File
	if err == nil && users != nil {
		ns, err = userNamespace(users)
		defer func() { _ = ns.Close() }() // nil if there is none
	}
	if err == nil {
		err = c.mountRoot(ctx, ns)
	}
	if err != nil {
		return err
	}
	atStep("mounted")
	b, err := c.openBundle()
	if err == nil && users != nil && b.spec.Linux != nil {
		b.spec.Linux.UIDMappings, b.spec.Linux.GIDMappings = users, users
	}
	if err == nil {
		b.resolve()
		err = u.join(&b.spec)
	}
	if err == nil {
		err = u.mountPrivately(&b.spec, ns)
	}
	u.closeJoined()
	if err == nil {
		err = checkSearch(users, b.spec.Root.Path)
	}
	if err == nil {
		err = c.giveSecrets(&b.spec, users)
	}
	if err == nil {
		err = passSockets(&b.spec, u.socketEnv, u.images != "")
	}
	if err != nil {
		return err
	}
	cgroups, err := placeCgroups(c.key(), u.r, detached, controllers(b.spec.Linux))
	if err == nil {
		err = checkEnds(&b.spec, cgroups.dirs)
	}
	if err != nil {
		return err
	}
	u.job = b.job(u.r)
	if u.job.Bundle, err = b.private(u.claim.path("bundle"), cgroups.path); err != nil {
		return err
	}
	u.state.Terminal, u.state.Init = b.spec.Process.Terminal, b.hasInit()
	u.state.Cgroups, u.state.Monitors = cgroups.dirs, cgroups.monitors
	return u.writeState(u.state) // from now on, whatever is in these cgroups belongs to the container
}

// MountRoot mounts the container's snapshot, unless it is mounted, and opens the root of the container's root
// filesystem.
func (c *Container) MountRoot(ctx context.Context) (*os.File, error) {
	if err := c.mountRoot(ctx, nil); err != nil {
		return nil, err
	}
	return c.OpenRoot()
}

// mountRoot mounts the container's snapshot. If users is not nil, its files' owners are mapped by that user namespace.
func (c *Container) mountRoot(ctx context.Context, users *os.File) error {
	if c.Snapshot == nil {
		return nil
	}
	if err := c.set.tree().Mkdir(c.rel("rootfs"), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if users != nil { // it may be mounted from when it was made, or from another run
		if err := c.UnmountRoot(); err != nil {
			return err
		}
	}
	target, err := c.openRootfs()
	if err != nil {
		return err
	}
	defer target.Close()
	if users == nil {
		return c.set.snapshots.Mount(ctx, *c.Snapshot, procPath(target)+"/.")
	}
	return c.set.snapshots.MountFor(ctx, *c.Snapshot, procPath(target)+"/.", users)
}

// enter records that a run begins, with this process as its monitor.
func (u *execution) enter(s state) (err error) {
	s.Status, s.Runtime, s.RuntimeState = Creating, u.r.command, u.r.root()
	if s.Monitor, err = Identify(os.Getpid()); err != nil {
		return err
	}
	u.state = s
	// Until state.json is written, exit.json with the end of the previous run counts.
	if err := u.writeState(u.state); err != nil {
		return err
	}
	atStep("creating")
	return u.blankExit()
}

// atStep is called before each step of a run; crash tests replace it to kill the process there.
var atStep = func(string) {}

// start lets the runtime make the process, as a child of this process.
func (u *execution) start(ctx context.Context, streams *stdio.Ends, console *stdio.Console) (pid int, err error) {
	// When the runtime exits, the container's process becomes our child.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return -1, fmt.Errorf("become subreaper: %w", err)
	}
	opts := &runc.CreateOpts{IO: streams, PidFile: u.claim.path("pid"), Detach: true, ExtraFiles: u.sockets}
	if console != nil {
		opts.ConsoleSocket = console
	}
	atStep("ready")
	err = u.mounts.run(func() error { return u.r.make(ctx, u, opts, console) })
	u.mounts.close()
	if err != nil {
		return -1, u.r.startError(u, err)
	}
	atStep("started")
	if pid, err = readPid(opts.PidFile); err != nil {
		return -1, err
	}
	if u.state.HostProcess, err = Identify(pid); err != nil {
		return -1, err
	}
	e := events.Event{Topic: "/tasks/start", Pid: pid}
	if u.exec != "" {
		e.Topic, e.Exec = "/tasks/exec-started", u.exec
		if s, err := statOf(pid); err == nil {
			u.state.Session = s.session
		}
	}
	u.state.Status, u.state.Started, u.state.Cgroups = Running, time.Now().UTC(), existing(u.state.Cgroups)
	if err := u.writeState(u.state); err != nil {
		return -1, err
	}
	u.c.log(e)
	atStep("running")
	return pid, nil
}

// abandon undoes the preparation of a run that can't begin, and returns err, the cause.
func (u *execution) abandon(ctx context.Context, err error) error {
	u.mounts.close()
	if u.exec == "" {
		_ = u.r.remove(ctx, u.claim, u.c.key())
		removeCgroups(u.state.Cgroups)
		_ = u.c.unmountSnapshot()
		u.c.disconnect(ctx)
		_ = os.Remove(u.c.path("exit.json")) // Before state.json is removed: a blank exit.json without it means a lost run.
		_ = u.leave(ctx)
		return err
	}
	// If this fails, the guard kills the process after this process has exited.
	if u.claim == nil || u.killStarted() == nil {
		_ = u.vanish()
	}
	if errors.Is(err, ErrCommandNotFound) || errors.Is(err, ErrCommandNotExecutable) {
		return err
	}
	return u.c.unlessEnded("exec", err)
}

func (c *Container) unmountSnapshot() error {
	if c.Snapshot == nil && !c.unread {
		return nil
	}
	return c.UnmountRoot()
}

// disconnect disconnects the container's network. Errors are ignored: the network of a container to be removed goes
// with that, and any other stays connected until the next run or the removal.
func (c *Container) disconnect(ctx context.Context) {
	if path := c.network(); path != "" && !c.RemoveAtEnd {
		_ = c.set.networks.Down(ctx, path)
	}
}

// connect connects the container's network. It records how to make the network again after a boot.
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

// end records how the process ended, and removes what is left of its run on the host.
func (u *execution) end(ctx context.Context, e Exit) error {
	atStep("ended")
	if u.exec == "" {
		e.OOMKilled = oomKills(u.state.Cgroups) > 0
	}
	// Record the end first, so that it is not lost if this process is killed later on.
	errs := []error{u.record(u.state, e)}
	atStep("recorded")
	switch {
	case u.exec == "":
		if !u.r.removeEnded(u.job, u.c.key(), u.state.Cgroups) {
			errs = append(errs, u.r.remove(ctx, u.claim, u.c.key()))
			removeCgroups(u.state.Cgroups)
		}
		atStep("removed")
		_ = u.c.unmountSnapshot()
		u.c.disconnect(ctx)
		atStep("unmounted")
	case !u.state.Detached:
		return u.vanish()
	}
	err := errors.Join(append(errs, u.leave(ctx))...)
	if u.exec != "" && errors.Is(err, fs.ErrNotExist) {
		return nil // the container has been removed
	}
	return err
}

// record writes the end of a run to the store.
func (p *Process) record(s state, e Exit) error {
	err := p.writeExit(e.of(s))
	if e.OOMKilled {
		p.c.log(events.Event{Topic: "/tasks/oom", Pid: s.Pid})
	}
	p.c.log(events.Event{Topic: "/tasks/exit", Exec: p.exec, Pid: s.Pid, Status: e.Status})
	if err != nil {
		return fmt.Errorf("%s: record the exit: %w", p, err)
	}
	return nil
}

// leave releases the locks. It removes the container first, if that is to be removed at its end.
func (u *execution) leave(ctx context.Context) error {
	u.guard.end()
	u.claim.release()
	u.state.freeUsers()
	if u.exec == "" && u.c.RemoveAtEnd {
		return u.c.remove(ctx, u.lock)
	}
	// A killed guard may close its copies of the descriptor a little later, so unlock explicitly.
	disk.Unlock(u.lock)
	return u.lock.Close()
}

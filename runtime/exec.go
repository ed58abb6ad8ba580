package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"distkit/errclass"
	"distkit/events"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Exec is a further process in a container. What it doesn't say is as the container's own
// process has it.
type Exec struct {
	ID          string // made up if empty
	Args        []string
	Env         []string // NAME=VALUE over the container's
	Cwd         string
	User        string // as [User] takes it, in the container's files
	Terminal    bool
	Interactive bool // a detached process has an input
	Streams     Streams
}

// Exec runs a further process in a container in the foreground, as [Container.Run] does the first,
// and returns its status.
func (c *Container) Exec(ctx context.Context, x Exec) (status int, err error) {
	u, p, err := c.beginExec(ctx, x, false)
	if err != nil {
		return -1, err
	}
	signals := catchSignals()
	if x.Terminal {
		if ws, err := stdio.WindowSize(); err == nil {
			p.ConsoleSize = &specs.Box{Height: uint(ws.Row), Width: uint(ws.Col)}
		}
	}
	u.process = p
	return u.foreground(ctx, signals, x.Streams)
}

// StartExec runs a further process in a container with nobody waiting for it, and returns its ID.
// What it prints and how it ends is kept until [Container.RemoveExec].
func (c *Container) StartExec(ctx context.Context, x Exec) (id string, err error) {
	u, p, err := c.beginExec(ctx, x, true)
	if err != nil {
		return "", err
	}
	o := order{
		Root: c.set.root, Namespace: c.Namespace, ID: c.ID, Command: u.r.command, State: u.r.state, Job: u.job, Run: u.state,
		Exec: u.exec, Process: p, Interactive: x.Interactive,
	}
	if _, err := spawn(o, u.lock, u.claim); err != nil {
		return "", u.abandon(ctx, err)
	}
	u.claim.close()
	return u.exec, u.lock.Close()
}

// beginExec makes a process's directory and description.
func (c *Container) beginExec(ctx context.Context, x Exec, detached bool) (u *execution, p *specs.Process, err error) {
	what := fmt.Sprintf("exec in container %s", c.ID)
	l, err := c.live()
	if err == nil && l.status == Paused {
		err = failed("container %s is paused", c.ID)
	}
	if err == nil {
		err = c.tend(ctx)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("exec: %w", err)
	}
	if x.ID == "" {
		x.ID = NewID()
	}
	if err := CheckID(x.ID); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", what, err)
	}
	if p, err = c.process(x, l.state.Pid); err != nil {
		return nil, nil, c.unlessEnded("exec", fmt.Errorf("%s: %w", what, err))
	}
	u = &execution{c: c, exec: x.ID, r: &Runtime{command: l.state.Runtime, state: filepath.Dir(l.state.RuntimeState)}}
	u.job = job{Command: p.Args[0], Terminal: x.Terminal}
	if u.lock, err = u.claimExec(); err != nil {
		return nil, nil, c.unlessEnded("exec", fmt.Errorf("%s: process %s: %w", what, x.ID, err))
	}
	err = func() error {
		if u.claim, err = scratch(execScratch(u.r.state, c.key(), x.ID)); err != nil {
			return err
		}
		self, err := Identify(os.Getpid())
		if err != nil {
			return err
		}
		u.state = state{
			Status: Creating, Runtime: u.r.command, RuntimeState: u.r.root(), Terminal: x.Terminal, Detached: detached, Interactive: x.Interactive,
			Monitor: self, Cgroups: l.state.Cgroups, Monitors: l.state.Monitors,
		}
		b, err := json.Marshal(p)
		if err == nil {
			err = c.set.tree().Replace(u.place().file("process.json"), append(b, '\n'), 0o600, false)
		}
		if err == nil {
			err = u.place().writeState(u.state)
		}
		if err == nil {
			err = u.place().blankExit()
		}
		return err
	}()
	if err != nil {
		return nil, nil, u.abandon(ctx, fmt.Errorf("%s: %w", what, err))
	}
	return u, p, nil
}

// claimExec makes the directory of a process; what a killed one has left makes place.
func (u *execution) claimExec() (*os.File, error) {
	// Not the directories above, which are there as long as the container runs.
	p := u.place()
	if err := u.c.set.makeDir(p.name); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	lock, err := lockFile(p.store, p.file("lock"), true)
	if errdefs.IsUnavailable(err) {
		return nil, errclass.Errorf(errdefs.ErrAlreadyExists, "it runs: take another ID")
	}
	if err != nil {
		return nil, err
	}
	l, err := look(p)
	if errdefs.IsNotFound(err) {
		return lock, nil
	}
	if err == nil && (l.status == Running || l.status == Stopped && (l.state == nil || l.state.Detached)) {
		err = errclass.Errorf(errdefs.ErrAlreadyExists, "it exists: remove it with task rm --exec-id, or take another ID")
	}
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	return lock, nil
}

func execScratch(state, key, exec string) string {
	return filepath.Join(claimDir(state, key), "exec-"+exec)
}

// scratch is a place in the state directory for what a runtime writes, without a claim on an ID.
func scratch(dir string) (*claim, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	working, err := os.OpenFile(filepath.Join(dir, "working"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	// Runtimes are to inherit it, as they do that of [claimID].
	_, _ = unix.FcntlInt(working.Fd(), unix.F_SETFD, 0)
	c := &claim{dir: dir, lock: lock, working: working}
	if !c.quiet() {
		c.close()
		return nil, busy("a runtime that an earlier call started still works on it")
	}
	_ = os.Remove(c.path("pid")) // of one that was killed
	return c, nil
}

// process describes what is to be executed.
func (c *Container) process(x Exec, pid int) (*specs.Process, error) {
	b, err := openBundleConfig(c.BundleDir(), c.BundleDir())
	if err != nil {
		return nil, err
	}
	p := *b.spec.Process
	p.Terminal, p.ConsoleSize = x.Terminal, nil
	if len(x.Args) == 0 {
		return nil, invalid("no command")
	}
	p.Args, p.CommandLine = x.Args, ""
	for _, a := range slices.Concat(x.Args, x.Env, []string{x.Cwd}) {
		if err := spec.CheckText("argument, variable or directory", a); err != nil {
			return nil, err
		}
	}
	if x.Terminal {
		p.Env = withDefault(p.Env, "TERM=xterm")
	}
	if x.User != "" {
		root := "/proc/" + strconv.Itoa(pid) + "/root"
		u, home, err := spec.User(root, x.User)
		if err != nil {
			return nil, err
		}
		// HOME is the user's, as docker has it, unless the image or the caller has set it to something
		// else than the home of the container's own user.
		if _, own, err := spec.User(root, strconv.FormatUint(uint64(p.User.UID), 10)); err == nil {
			p.Env = slices.DeleteFunc(slices.Clone(p.Env), func(v string) bool { return v == "HOME="+own })
		}
		p.Env = withDefault(p.Env, "HOME="+home)
		u.Umask = p.User.Umask
		p.User = u
		if u.UID != 0 && p.Capabilities != nil {
			// As execve(2) would leave them to who isn't root.
			caps := *p.Capabilities
			caps.Effective, caps.Permitted, caps.Ambient, caps.Inheritable = nil, nil, nil, nil
			p.Capabilities = &caps
		}
	}
	for _, v := range x.Env {
		name, _, ok := strings.Cut(v, "=")
		if name == "" {
			return nil, invalid("variable %q has no name", v)
		}
		var env []string
		for _, old := range p.Env {
			if n, _, _ := strings.Cut(old, "="); n != name {
				env = append(env, old)
			}
		}
		if p.Env = env; ok {
			p.Env = append(p.Env, v)
		}
	}
	if x.Cwd != "" {
		if p.Cwd = x.Cwd; !filepath.IsAbs(x.Cwd) {
			return nil, invalid("working directory %q is not absolute", x.Cwd)
		}
	}
	return &p, nil
}

// withDefault adds a variable that isn't set.
func withDefault(env []string, v string) []string {
	name, _, _ := strings.Cut(v, "=")
	if slices.ContainsFunc(env, func(have string) bool { return strings.HasPrefix(have, name+"=") }) {
		return env
	}
	return append(slices.Clone(env), v)
}

// startExec has the runtime execute a process.
func (r *Runtime) startExec(ctx context.Context, client *runc.Runc, id string, p *specs.Process, opts *runc.CreateOpts, console *stdio.Console) error {
	// runc gives a further process its own umask.
	umask := 0o022
	if p.User.Umask != nil {
		umask = int(*p.User.Umask)
	}
	defer unix.Umask(unix.Umask(umask))
	err := client.Exec(ctx, id, *p, &runc.ExecOpts{IO: opts.IO, PidFile: opts.PidFile, ConsoleSocket: opts.ConsoleSocket, Detach: true})
	if err == nil && console != nil {
		err = console.Receive()
	}
	return err
}

func (c *Container) findExec(id string) (place, error) {
	if err := CheckID(id); err != nil {
		return place{}, err
	}
	p := c.execPlace(id)
	if _, err := p.store.Stat(p.name); errors.Is(err, fs.ErrNotExist) {
		return p, notFound("container %s has no process %s", c.ID, id)
	}
	return p, nil
}

// lookExec is look at such a process. NotFound where the container has none of that ID.
func (c *Container) lookExec(id string) (p place, l looked, err error) {
	if p, err = c.findExec(id); err != nil {
		return p, l, err
	}
	if l, err = look(p); err != nil {
		err = fmt.Errorf("%s: %w", c.execName(id), err)
	}
	return p, l, err
}

func (c *Container) execName(id string) string {
	return fmt.Sprintf("process %s of container %s", id, c.ID)
}

// KillExec sends a signal to a process that [Container.Exec] or [Container.StartExec] started.
func (c *Container) KillExec(ctx context.Context, id string, sig unix.Signal) error {
	p, l, err := c.lookExec(id)
	if err == nil {
		err = c.tendTo(ctx, p)
	}
	if err != nil {
		return err
	}
	if l.status != Running && l.status != Paused {
		return failed("kill: %s is %s", c.execName(id), l.status)
	}
	return l.state.signal(sig)
}

// WaitExec waits for the end of such a process.
func (c *Container) WaitExec(ctx context.Context, id string) (*Exit, error) {
	p, err := c.findExec(id)
	if err != nil {
		return nil, err
	}
	return c.wait(ctx, p, c.execName(id))
}

// ExecLogs calls f with what such a process, a detached one, has printed.
func (c *Container) ExecLogs(ctx context.Context, id string, o Logs, f func(stdio.Entry) error) error {
	p, err := c.findExec(id)
	if err != nil {
		return err
	}
	return c.logs(ctx, p, c.execName(id), o, f)
}

// AttachExec joins such a process, a detached one.
func (c *Container) AttachExec(ctx context.Context, id string, o Attach) (*Exit, error) {
	p, l, err := c.lookExec(id)
	if err == nil && (l.status != Running || !l.state.Detached) {
		err = failed("attach: %s is not detached and running", c.execName(id))
	}
	if err == nil {
		err = c.tendTo(ctx, p)
	}
	if err != nil {
		return nil, err
	}
	return c.attach(ctx, p, c.execName(id), l, o)
}

// RemoveExec removes what is kept of such a process, and returns how it ended. One that runs is
// FailedPrecondition, or killed if force says so.
func (c *Container) RemoveExec(ctx context.Context, id string, force bool) (*Exit, error) {
	p, l, err := c.lookExec(id)
	if err != nil {
		return nil, err
	}
	if l.status == Running || l.status == Creating {
		if !force || l.status == Creating {
			return nil, failed("remove %s: it is %s: end it first, or force it", c.execName(id), l.status)
		}
		if err := l.state.signal(unix.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		if _, err := c.wait(ctx, p, c.execName(id)); err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
	}
	var lock *os.File
	for range 200 {
		if lock, err = lockFile(p.store, p.file("lock"), false); !errdefs.IsUnavailable(err) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return l.exit, nil
	}
	if err != nil {
		return nil, fmt.Errorf("remove %s: %w", c.execName(id), err)
	}
	defer lock.Close()
	if _, l, err = c.lookExec(id); err != nil {
		return nil, err
	}
	return l.exit, removeExecDir(p)
}

func removeExecDir(p place) error {
	if err := p.undescribe(); err != nil {
		return err
	}
	return removeAll(p.store, p.name)
}

// endExec records the end of a further process.
func (u *execution) endExec(e Exit) error {
	err := u.place().writeExit(e.of(u.state))
	u.c.log(events.Event{Topic: "/tasks/exit", Exec: u.exec, Pid: u.state.Pid, Status: e.Status})
	if !u.state.Detached {
		err = removeExecDir(u.place())
		u.guard.end()
	}
	u.claim.release()
	if cerr := u.lock.Close(); err == nil {
		err = cerr
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the container has been removed
	}
	return err
}

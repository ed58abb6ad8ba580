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

	"distkit/disk"
	"distkit/errclass"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
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
	u, err := c.beginExec(ctx, x, false)
	if err != nil {
		return -1, err
	}
	u.signals = catchSignals()
	if x.Terminal {
		if ws, err := stdio.WindowSize(); err == nil {
			u.config.ConsoleSize = &specs.Box{Height: uint(ws.Row), Width: uint(ws.Col)}
		}
	}
	return u.foreground(ctx, x.Streams)
}

// StartExec runs a further process in a container with nobody waiting for it, and returns its ID. What it prints and how
// it ends is kept until [Process.Remove].
func (c *Container) StartExec(ctx context.Context, x Exec) (id string, err error) {
	u, err := c.beginExec(ctx, x, true)
	if err == nil {
		id = u.exec
		_, err = u.detach(ctx)
	}
	return id, err
}

// beginExec makes a process's directories, and what the runtime is given. If it fails, it has undone what it did.
func (c *Container) beginExec(ctx context.Context, x Exec, detached bool) (*execution, error) {
	l, err := c.proc("").attended(ctx, "exec")
	switch {
	case err != nil:
		return nil, err
	case l.status == Paused:
		return nil, failed("exec: container %s is paused", c.ID)
	case x.ID == "":
		x.ID = NewID()
	}
	err = CheckID(x.ID)
	u := &execution{Process: c.proc(x.ID), r: &Runtime{command: l.state.Runtime, state: c.set.state}}
	if err == nil {
		u.config, err = c.further(x, l.state.Pid)
	}
	if err == nil {
		if u.lock, err = u.claimStore(); err != nil {
			err = fmt.Errorf("process %s: %w", x.ID, err)
		}
	}
	if err != nil {
		return nil, c.unlessEnded("exec", fmt.Errorf("exec in container %s: %w", c.ID, err))
	}
	u.job.Command = u.config.Args[0]
	err = func() error {
		if u.claim, err = u.claimHost(ctx); err != nil {
			return err
		}
		b, err := json.Marshal(u.config)
		if err == nil {
			err = c.set.tree().Replace(u.file("process.json"), append(b, '\n'), 0o600, false)
		}
		if err != nil {
			return err
		}
		return u.enter(state{Terminal: x.Terminal, Detached: detached, Interactive: x.Interactive, Cgroups: l.state.Cgroups, Monitors: l.state.Monitors})
	}()
	if err != nil {
		return nil, u.abandon(ctx, fmt.Errorf("exec in container %s: %w", c.ID, err))
	}
	return u, nil
}

// claimStore makes the directory of a further process, and takes its lock. A directory that a killed process left behind
// is reused.
func (p *Process) claimStore() (*os.File, error) {
	var lock *os.File
	err := fs.ErrNotExist
	for errors.Is(err, fs.ErrNotExist) { // the guard of a killed process removes the directory in the end
		// Not the directories above, which are there as long as the container runs.
		if err := p.c.set.makeDir(p.name); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		lock, err = p.lockEnding(true)
	}
	if errdefs.IsUnavailable(err) {
		return nil, errclass.Errorf(errdefs.ErrAlreadyExists, "it runs: take another ID")
	}
	if err != nil {
		return nil, err
	}
	if !p.described() {
		return lock, nil
	}
	l, err := p.look()
	if err == nil && (l.status == Running || l.status == Stopped && (l.state == nil || l.state.Detached)) {
		err = errclass.Errorf(errdefs.ErrAlreadyExists, "it exists: remove it with task rm --exec-id, or take another ID")
	}
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	return lock, nil
}

// further describes a further process for the runtime.
func (c *Container) further(x Exec, pid int) (*specs.Process, error) {
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

// vanish removes what there is of a further process that nobody is to see any more. The directory on this host goes before the lock
// in the store is given back: whoever gets that lock takes the ID, and both directories with it.
func (u *execution) vanish() error {
	err := u.undescribe()
	u.guard.end()
	u.claim.release()
	if err == nil {
		err = u.removeDir(u.lock)
	}
	disk.Unlock(u.lock)
	_ = u.lock.Close()
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the container has been removed
	}
	return err
}

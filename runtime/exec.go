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

// Exec describes a further process in a container. What it leaves empty is as for the container's own process.
type Exec struct {
	ID          string // "" means a new one
	Args        []string
	Env         []string // NAME=VALUE, overriding the container's
	Cwd         string
	User        string // as for spec.User, with names looked up in the container
	Terminal    bool
	Interactive bool // the process has an input when detached
	Streams     Streams
}

// Exec runs a further process in a container in the foreground, like [Container.Run], and returns its status.
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

// StartExec starts a further process in a container, detached, and returns its ID. Its output and its end are kept
// until [Process.Remove].
func (c *Container) StartExec(ctx context.Context, x Exec) (id string, err error) {
	u, err := c.beginExec(ctx, x, true)
	if err == nil {
		id = u.exec
		_, err = u.detach(ctx)
	}
	return id, err
}

// beginExec makes the process's directories, and what the runtime needs. After an error it has undone what it did.
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

// claimStore makes the directory of a further process in the store and takes its lock. It reuses a directory that a
// killed process has left.
func (p *Process) claimStore() (*os.File, error) {
	var lock *os.File
	err := fs.ErrNotExist
	for errors.Is(err, fs.ErrNotExist) { // the guard of a killed process may remove the directory at any moment
		// Only this directory is made: those above exist as long as the container runs.
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

// further returns the runtime's description of a further process.
func (c *Container) further(x Exec, pid int) (*specs.Process, error) {
	b, err := c.openConfig()
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
		// As in docker, HOME is the home directory of the process's user. If the image or the caller has set it to
		// anything other than the home of the container's own user, it stays.
		if _, own, err := spec.User(root, strconv.FormatUint(uint64(p.User.UID), 10)); err == nil {
			p.Env = slices.DeleteFunc(slices.Clone(p.Env), func(v string) bool { return v == "HOME="+own })
		}
		p.Env = withDefault(p.Env, "HOME="+home)
		u.Umask = p.User.Umask
		p.User = u
		if u.UID != 0 && p.Capabilities != nil {
			// the capabilities that execve(2) leaves to a user other than root
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

// withDefault adds a variable unless it is set.
func withDefault(env []string, v string) []string {
	name, _, _ := strings.Cut(v, "=")
	if slices.ContainsFunc(env, func(have string) bool { return strings.HasPrefix(have, name+"=") }) {
		return env
	}
	return append(slices.Clone(env), v)
}

// vanish removes a further process whose record is no longer needed. It removes the directory on this host before it
// releases the lock in the store: whoever gets that lock owns the ID, and with it both directories.
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

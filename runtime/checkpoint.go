package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"distkit/errclass"
	"distkit/events"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
)

// CheckCriu tells whether criu can work here. NotImplemented, with its reason, where it can't.
func CheckCriu(ctx context.Context) error {
	name, err := exec.LookPath("criu")
	if err != nil {
		if name, err = exec.LookPath("/usr/sbin/criu"); err != nil {
			return errclass.Errorf(errdefs.ErrNotImplemented, "criu is not installed")
		}
	}
	c := exec.CommandContext(ctx, name, "check")
	out, err := c.CombinedOutput()
	if err == nil {
		return nil
	}
	reason := criuError(out)
	if reason == "" {
		reason = err.Error()
	}
	return errclass.Errorf(errdefs.ErrNotImplemented, "criu can't work here: %s", reason)
}

// criuError is the first error that criu has logged of itself, "" where there is none.
func criuError(log []byte) string {
	for line := range strings.Lines(string(log)) {
		_, message, ok := strings.Cut(line, "Error (")
		if message = strings.TrimSpace(message); ok && !strings.Contains(message, "rlimit: ") { // which is a warning
			return "Error (" + message
		}
	}
	return ""
}

// criuFailed is a runtime's error, with what criu has logged of it in a directory.
func criuFailed(err error, name string) error {
	log, _ := os.ReadFile(name)
	if reason := criuError(log); reason != "" {
		return errors.New("criu: " + reason)
	}
	return err
}

// Checkpoint writes the state of a container's processes to a directory, by criu, and calls save
// while nothing in the container moves. Then the container goes on, or ends if exit says so.
// NotImplemented where criu can't work.
func (c *Container) Checkpoint(ctx context.Context, dir string, exit bool, save func() error) (err error) {
	l, err := c.live()
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	if err := CheckCriu(ctx); err != nil {
		return fmt.Errorf("checkpoint container %s: %w", c.ID, err)
	}
	if c.Interactive && l.state.Detached && !l.state.Terminal {
		return failed("checkpoint: container %s has an input that comes from outside of it: only one without, or with a terminal, can be stored", c.ID)
	}
	if err := c.tend(ctx); err != nil {
		return err
	}
	if l.status != Paused {
		if err := l.client().Pause(ctx, c.key()); err != nil {
			return runtimeError(c, "pause", err)
		}
		defer func() {
			if err == nil && exit {
				return
			}
			// Also where ctx is done.
			if rerr := l.client().Resume(context.WithoutCancel(ctx), c.key()); rerr != nil && err == nil {
				err = runtimeError(c, "resume", rerr)
			}
		}()
	}
	opts := &runc.CheckpointOpts{ImagePath: dir, WorkDir: dir, AllowOpenTCP: true, AllowExternalUnixSockets: true, FileLocks: true, AllowTerminal: l.state.Terminal}
	if err := l.client().Checkpoint(ctx, c.key(), opts, runc.LeaveRunning); err != nil {
		return runtimeError(c, "checkpoint", criuFailed(err, filepath.Join(dir, "dump.log")))
	}
	if err := save(); err != nil {
		return err
	}
	c.log(events.Event{Topic: "/tasks/checkpointed", Pid: l.state.Pid})
	if !exit {
		return nil
	}
	if err := l.state.signal(unix.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	thaw(l.state.Cgroups)
	_, err = c.Wait(ctx)
	if errdefs.IsNotFound(err) {
		return nil // it was to be removed at its end
	}
	return err
}

// Restore runs a container in the foreground, as [Container.Run] does, with the processes whose state is in
// the directory images, as [Container.Checkpoint] wrote it. NotImplemented where criu can't work.
func (c *Container) Restore(ctx context.Context, r *Runtime, images string, s Streams) (status int, err error) {
	lock, err := c.lockRestored(ctx)
	if err != nil {
		return -1, err
	}
	return c.run(ctx, r, lock, images, s)
}

// StartRestored is Restore in the background, as [Container.Start] is.
func (c *Container) StartRestored(ctx context.Context, r *Runtime, images string) (pid int, err error) {
	lock, err := c.lockRestored(ctx)
	if err != nil {
		return -1, err
	}
	return c.detach(ctx, r, lock, images)
}

func (c *Container) lockRestored(ctx context.Context) (*os.File, error) {
	if err := CheckCriu(ctx); err != nil {
		return nil, fmt.Errorf("restore container %s: %w", c.ID, err)
	}
	return c.lockStopped(ctx)
}

// restore has the runtime make the container from its processes' state.
func (r *Runtime) restore(ctx context.Context, client *runc.Runc, id string, u *execution, opts *runc.CreateOpts, console *stdio.Console) error {
	work, err := os.MkdirTemp(u.claim.dir, "criu-")
	if err != nil {
		return err
	}
	o := &runc.RestoreOpts{
		CheckpointOpts: runc.CheckpointOpts{ImagePath: u.images, WorkDir: work, AllowOpenTCP: true, AllowExternalUnixSockets: true, FileLocks: true, AllowTerminal: console != nil},
		IO:             opts.IO, Detach: true, PidFile: opts.PidFile, ConsoleSocket: opts.ConsoleSocket,
	}
	if _, err := client.Restore(ctx, id, u.job.Bundle, o); err != nil {
		return criuFailed(err, filepath.Join(work, "restore.log"))
	}
	if console != nil {
		return console.Receive()
	}
	return nil
}

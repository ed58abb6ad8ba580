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
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
)

// CheckCriu returns NotImplemented, with the reason, if criu can't work here.
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

// criuError returns the first error in criu's log, or "".
func criuError(log []byte) string {
	for line := range strings.Lines(string(log)) {
		_, message, ok := strings.Cut(line, "Error (")
		if message = strings.TrimSpace(message); ok && !strings.Contains(message, "rlimit: ") { // only a warning, although logged as an error
			return "Error (" + message
		}
	}
	return ""
}

// criuFailed returns a runtime's error together with the error in criu's log in a directory.
func criuFailed(err error, name string) error {
	log, _ := os.ReadFile(name)
	if reason := criuError(log); reason != "" {
		return errors.New("criu: " + reason)
	}
	return err
}

// Checkpoint writes the state of a container's processes to a directory, with criu. It calls save while the container
// is paused. After that the container continues, or ends if exit is true. NotImplemented: criu can't work here.
func (c *Container) Checkpoint(ctx context.Context, dir string, exit bool, save func() error) (err error) {
	l, err := c.proc("").attended(ctx, "checkpoint")
	if err != nil {
		return err
	}
	if len(c.Secrets) > 0 {
		return failed("checkpoint: container %s has secrets, which its memory may hold: they are not stored", c.ID)
	}
	if err := CheckCriu(ctx); err != nil {
		return fmt.Errorf("checkpoint container %s: %w", c.ID, err)
	}
	if len(c.Namespaces) > 0 {
		return failed("checkpoint: container %s is in namespaces of other containers", c.ID)
	}
	b, err := c.openConfig()
	if err != nil {
		return err
	}
	if b.spec.Linux != nil {
		if never := spec.NeverRestored(b.spec.Linux.Namespaces); len(never) > 0 {
			return failed("checkpoint: container %s has what no restored one can have: %s", c.ID, strings.Join(never, ", "))
		}
	}
	if l.state.Interactive && l.state.Detached && !l.state.Terminal {
		return failed("checkpoint: container %s has an input that comes from outside of it: only one without, or with a terminal, can be stored", c.ID)
	}
	if l.status != Paused {
		if err := l.client().Pause(ctx, c.key()); err != nil {
			return runtimeError(c, "pause", err)
		}
		defer func() {
			if err == nil && exit {
				return
			}
			// even if ctx is done
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
	_, err = c.proc("").Wait(ctx)
	if errdefs.IsNotFound(err) {
		return nil // it was removed at its end
	}
	return err
}

// FromCheckpoint makes the next run of the container restore its processes from [Container.CheckpointDir], as written
// by [Container.Checkpoint]. If criu can't work, that run fails with NotImplemented.
func (c *Container) FromCheckpoint() { c.restored = true }

// restore lets the runtime restore the container's processes.
func (r *Runtime) restore(ctx context.Context, client *runc.Runc, u *execution, opts *runc.CreateOpts, terminal bool) error {
	work, err := os.MkdirTemp(u.claim.dir, "criu-")
	if err != nil {
		return err
	}
	o := &runc.RestoreOpts{
		CheckpointOpts: runc.CheckpointOpts{ImagePath: u.images, WorkDir: work, AllowOpenTCP: true, AllowExternalUnixSockets: true, FileLocks: true, AllowTerminal: terminal},
		IO:             opts.IO, Detach: true, PidFile: opts.PidFile, ConsoleSocket: opts.ConsoleSocket,
	}
	if _, err := client.Restore(ctx, u.c.key(), u.job.Bundle, o); err != nil {
		return criuFailed(err, filepath.Join(work, "restore.log"))
	}
	return nil
}

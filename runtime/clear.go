package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"distkit/events"

	"github.com/containerd/errdefs"
)

// never tells whether the container has not been run.
func (c *Container) never() bool {
	l, err := look(c.place())
	return err == nil && l.state == nil && l.exit == nil
}

// dead tells whether a container has to be cleared up: its process or its making has ended,
// and nobody lives who will record that. One that was to be removed at its end is to be, too.
func (c *Container) dead() bool {
	l, err := look(c.place())
	if err != nil {
		return false
	}
	switch {
	case l.state != nil:
		// Nobody removes what is left of it on the host. In the foreground its process ends with its run.
		return !l.monitored && (l.status != Running && l.status != Paused || !l.state.Detached)
	case !c.own:
		return false // a stranger's, in which nothing of this host's is left
	case c.RemoveAtEnd:
		return l.exit != nil || c.Owner != nil && !c.Owner.Alive()
	}
	return l.lost()
}

// runIsGone reports whether the container was that of a run in the foreground that was killed, and was to be removed at
// its end: it does not keep the ID.
func (c *Container) runIsGone() bool {
	l, err := look(c.place())
	return err == nil && c.RemoveAtEnd && l.state != nil && !l.state.Detached && !l.monitored
}

// Clear clears up the containers of the namespace that are dead without anybody having seen
// it: what is left of them on the host is removed, their end is recorded, and those go that were to be
// removed at their end. Others are not touched. What it can't clear up stays as it is, for the
// call that works on it to say why.
func (s *Containers) Clear(ctx context.Context) {
	ids, err := s.ids()
	if err != nil {
		return
	}
	for _, id := range ids {
		c, err := s.readRecord(id)
		if err != nil {
			continue
		}
		c.own = true // which is found out below, for the few that may be dead
		if !c.dead() {
			continue
		}
		lock, err := lockFile(s.tree(), c.rel("lock"), false)
		if err != nil {
			continue
		}
		if c, err = s.read(id); err != nil || !c.dead() {
			_ = lock.Close()
			continue
		}
		if err := c.clear(ctx, nil); err == nil && c.RemoveAtEnd {
			_ = c.remove(ctx, lock)
			continue
		}
		_ = lock.Close()
	}
}

// clear removes what the last run has left on the host, its process too, and records the end
// that nobody saw. The caller has the lock, and held, the right to the runtime's ID, or nil.
func (c *Container) clear(ctx context.Context, held *claim) (err error) {
	l, err := look(c.place())
	if err != nil || l.state == nil && !l.lost() {
		return err
	}
	claim := held
	if held == nil && l.state != nil {
		if claim, err = c.claimID(ctx); err != nil {
			return err
		}
		// Where this fails the state stays for the next who tries.
		defer func() {
			if err == nil {
				claim.release()
			} else {
				claim.close()
			}
		}()
	}
	if l.state != nil {
		if err = l.state.clearHost(ctx, claim, c.key()); err != nil {
			return fmt.Errorf("container %s: %w", c.ID, err)
		}
	}
	if err = c.unmountSnapshot(); err != nil {
		return err
	}
	c.disconnect(ctx)
	if err = removeAll(c.set.tree(), c.rel("exec")); err != nil {
		return err
	}
	switch {
	case l.exit != nil && !l.exit.Exited.IsZero():
	case l.state == nil || l.state.Status == Running:
		var s state
		if l.state != nil {
			s = *l.state
		}
		err = c.record(s, Exit{Exited: time.Now().UTC(), Error: errLost})
	default:
		if err = os.Remove(c.path("exit.json")); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if err == nil && held != nil && l.state != nil {
		err = os.Remove(held.path("state.json"))
	}
	return err
}

// clearHost kills what is left of a run, and removes what the runtime made for it. The caller has the right to the ID.
func (s *state) clearHost(ctx context.Context, c *claim, key string) error {
	r := &Runtime{command: s.Runtime, state: c.state}
	// A runtime that still works ends when what it makes is killed, and may have made more until then.
	if err := killAll(ctx, s); err != nil {
		return err
	}
	quiet := c.quiet() // a container that is made but not started keeps it busy until it is removed
	if err := killAll(ctx, s); err != nil {
		return err
	}
	if err := r.remove(ctx, r.client(c), key); err != nil {
		return err
	}
	if !quiet && !c.quiet() {
		return busy("a runtime that an earlier run started still works on it")
	}
	removeCgroups(s.Cgroups)
	return nil
}

// Remove removes a container, and returns how its last run ended, nil if it was never run. One that runs
// is FailedPrecondition unless force says that it is to be killed.
func (c *Container) Remove(ctx context.Context, force bool) (*Exit, error) {
	defer c.set.Clear(ctx)
	// Who monitors it, and sees its end, may remove it too: the file is open before.
	exit, _ := c.set.tree().Open(c.rel("exit.json"))
	if exit != nil {
		defer exit.Close()
	}
	l, err := look(c.place())
	if errdefs.IsNotFound(err) && c.RemoveAtEnd && exit != nil {
		return exitOf(exit), nil
	}
	if err != nil {
		return nil, fmt.Errorf("remove container %s: %w", c.ID, err)
	}
	if !force && l.status == Created && c.own && c.Owner != nil && c.Owner.Alive() && c.Owner.Pid != os.Getpid() {
		return nil, failed("remove container %s: process %d is making it: let it, or force the removal", c.ID, c.Owner.Pid)
	}
	if l.status == Running || l.status == Paused || l.status == Creating {
		if !force {
			return nil, failed("remove container %s: it is %s: end it first, or force it", c.ID, l.status)
		}
		if l.state.Status == Running {
			if err := killAll(ctx, l.state); err != nil {
				return nil, fmt.Errorf("remove container %s: %w", c.ID, err)
			}
		}
	}
	lock, err := c.waitLock(ctx)
	switch {
	case errdefs.IsNotFound(err) && c.RemoveAtEnd && exit != nil:
		return exitOf(exit), nil
	case err != nil:
		return nil, err
	}
	if err := c.clear(ctx, nil); err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("remove container %s: %w", c.ID, err)
	}
	l, err = look(c.place())
	if err == nil {
		err = c.remove(ctx, lock)
	} else {
		_ = lock.Close()
	}
	return l.exit, err
}

// waitLock takes the lock of a container that ends.
func (c *Container) waitLock(ctx context.Context) (*os.File, error) {
	end := time.Now().Add(15 * time.Second)
	for {
		lock, err := c.lock()
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

// remove removes a container that has no process. It owns the lock.
func (c *Container) remove(ctx context.Context, lock *os.File) error {
	if err := c.unmount(); err != nil {
		_ = lock.Close()
		return fmt.Errorf("remove container %s: %w", c.ID, err)
	}
	at("remove")
	if err := c.removeResources(ctx); err != nil {
		_ = lock.Close()
		return fmt.Errorf("remove container %s: %w", c.ID, err)
	}
	at("snapshot removed")
	if err := c.delete(lock); err != nil {
		return fmt.Errorf("remove container %s: %w", c.ID, err)
	}
	c.log(events.Event{Topic: "/containers/delete"})
	return nil
}

// removeResources removes what was made for the container beside its directory.
func (c *Container) removeResources(ctx context.Context) error {
	if path := c.network(); path != "" {
		if err := c.set.networks.Remove(ctx, path); err != nil {
			return fmt.Errorf("network: %w", err)
		}
	}
	if c.Snapshot != nil {
		if err := c.set.snapshots.Remove(ctx, *c.Snapshot); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

func exitOf(f *os.File) *Exit {
	b := make([]byte, 2*exitRoom)
	n, _ := f.ReadAt(b, 0)
	return parseExit(b[:n])
}

package runtime

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"distkit/disk"

	"golang.org/x/sys/unix"
)

const maxIdentifier = 76

// CheckID returns InvalidArgument unless id is valid for a container or a namespace, by the rule of containerd's
// pkg/identifiers: letters and digits, with single - . _ between them, at most 76 characters.
func CheckID(id string) error {
	separated := true
	ok := len(id) <= maxIdentifier
	for _, c := range []byte(id) {
		switch {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
			separated = false
		case (c == '-' || c == '.' || c == '_') && !separated:
			separated = true
		default:
			ok = false
		}
	}
	if !ok || separated {
		return invalid("%.100q is not an ID: letters, digits and single - . _ between them, %d characters at most", id, maxIdentifier)
	}
	return nil
}

// NewID returns a random ID.
func NewID() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// DefaultState returns the directory for the state of runs: /run/distkit for root, a private directory for other users.
// Like the runs, it does not survive a boot.
func DefaultState() string {
	if rootOfHost() {
		return "/run/distkit"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "distkit")
	}
	return filepath.Join(os.TempDir(), "distkit-"+strconv.Itoa(os.Geteuid()))
}

// rootOfHost reports whether this process is root in the initial user namespace. Root of another one is not trusted
// with /run, which other users may be able to write to there.
func rootOfHost() bool {
	var st unix.Stat_t
	return os.Geteuid() == 0 && unix.Stat("/run", &st) == nil && st.Uid == 0 && unix.Access("/run", unix.W_OK) == nil
}

// PrivateDir makes a directory that only this user can access. If the directory exists, it must be like that.
func PrivateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return privateState(dir)
}

// claim is the right to run a process on this host, with a directory for the run's files. For a container's own process
// the right is a lock on the ID. For a further process it is the process's lock in the store. Each runtime process
// inherits a second lock, working: if a runtime outlives a killed run, the next run waits for it.
type claim struct {
	state, dir string
	lock       *os.File // nil for a further process
	working    *os.File
}

func claimDir(state, id string) string  { return filepath.Join(state, "run", id) }
func claimLock(state, id string) string { return filepath.Join(state, "lock", id) }

// claimID claims an ID. Unavailable: it is in use. What a killed process has left in the directory stays there.
//
// IDs are unique per host: an ID is also taken if a running container of another store has it. owner is the caller's
// container. If a container of another store has ended, what it has left on the host is removed.
func claimID(ctx context.Context, state, id string, owner identity) (*claim, error) {
	name := claimLock(state, id)
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	for {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lock container %s: %w", id, err)
		}
		if err := disk.Lock(f, unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, busy("container %s is in use: take another --id, or let its run end", id)
			}
			return nil, fmt.Errorf("lock container %s: %w", id, err)
		}
		var have, now unix.Stat_t
		if unix.Fstat(int(f.Fd()), &have) != nil || unix.Stat(name, &now) != nil || have.Ino != now.Ino || have.Dev != now.Dev {
			f.Close() // its last owner has removed it
			continue
		}
		c := &claim{state: state, dir: claimDir(state, id), lock: f}
		if err := c.open(ctx, id, owner); err != nil {
			c.close()
			return nil, fmt.Errorf("lock container %s: %w", id, err)
		}
		return c, nil
	}
}

func (c *claim) open(ctx context.Context, id string, owner identity) (err error) {
	// A further process of an earlier container with this ID may remove the directory while it is empty: see release.
	for range 100 {
		if err := os.MkdirAll(c.dir, 0o700); err != nil {
			return err
		}
		if err = c.openWorking(); !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	if err != nil {
		return err
	}
	other, err := readPrivateState(c.dir)
	if other == nil || other.Identity == owner || err != nil {
		return err
	}
	if other.Alive() || other.Monitor.Alive() {
		return busy("it is in use by %s: take another ID", other.Dir)
	}
	if err := other.clearHost(ctx, c, id); err != nil {
		return err
	}
	return os.Remove(c.path("state.json"))
}

// openWorking opens the second lock, which runtimes inherit. They do not pass it on to processes in the container.
func (c *claim) openWorking() (err error) {
	if c.working, err = os.OpenFile(c.path("working"), os.O_RDWR|os.O_CREATE, 0o600); err == nil {
		_, err = unix.FcntlInt(c.working.Fd(), unix.F_SETFD, 0)
	}
	return err
}

// claimHost claims what is needed to run a process on this host: the ID for the container's own process. For a further
// process, whose lock in the store the caller holds, it only makes a directory.
func (p *Process) claimHost(ctx context.Context) (*claim, error) {
	c := &claim{state: p.c.set.state, dir: p.private}
	if p.exec == "" {
		if err := PrivateDir(c.state); err != nil {
			return nil, err
		}
		owner, err := identify(p.dir())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
		return claimID(ctx, c.state, p.c.key(), owner)
	}
	if err := os.Mkdir(c.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	err := c.openWorking()
	if err == nil && !c.quiet() {
		err = busy("a runtime that an earlier call started still works on it")
	}
	if err != nil {
		c.close()
		return nil, err
	}
	_ = os.Remove(c.path("pid")) // left by a killed run
	return c, nil
}

// quiet waits until no runtime process works on the ID. It waits up to ten seconds, or up to two if the container
// exists: a container that was made but not started keeps the lock until it is removed.
func (c *claim) quiet() bool {
	end := time.Now().Add(10 * time.Second)
	for made := false; ; time.Sleep(10 * time.Millisecond) {
		if disk.Lock(c.working, unix.LOCK_EX|unix.LOCK_NB) == nil {
			return true
		}
		if _, err := os.Stat(c.path("pid")); err == nil && !made {
			made, end = true, time.Now().Add(2*time.Second)
		}
		if time.Now().After(end) {
			return false
		}
	}
}

func (c *claim) path(name string) string { return filepath.Join(c.dir, name) }

// release gives up the claim and removes the directory. The lock file is removed last, and only by its owner.
//
// A further process may start while its container ends, and make its directory in the container's after that has been
// emptied. Whoever of the two is last then removes the container's directory.
func (c *claim) release() {
	if c == nil {
		return
	}
	_ = os.RemoveAll(c.dir)
	if c.lock == nil {
		_ = os.Remove(filepath.Dir(c.dir)) // fails unless it is empty
	} else {
		_ = os.Remove(c.lock.Name())
	}
	c.close()
}

// close gives up the claim, but keeps the contents of the directory.
func (c *claim) close() {
	if c != nil {
		_ = c.working.Close() // fails for nil
		_ = c.lock.Close()
	}
}

// Key returns a container's ID for the runtime, which has no namespaces: the ID itself in the namespace default,
// NAMESPACE+ID in others (IDs never contain +).
func Key(namespace, id string) (string, error) {
	if err := CheckID(id); err != nil {
		return "", err
	}
	if namespace == "default" {
		return id, nil
	}
	if err := CheckID(namespace); err != nil {
		return "", fmt.Errorf("namespace: %w", err)
	}
	return namespace + "+" + id, nil
}

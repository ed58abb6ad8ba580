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

// CheckID tells whether a container ID or a namespace is one as containerd's pkg/identifiers
// has them: letters and digits, with single - . _ between them, 76 characters at most.
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

// NewID makes an ID up.
func NewID() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// DefaultState is where the state of what runs is kept: /run/distkit for root, a directory of
// the user's own for others. Like what it describes it does not outlive a boot.
func DefaultState() string {
	if rootOfHost() {
		return "/run/distkit"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "distkit")
	}
	return filepath.Join(os.TempDir(), "distkit-"+strconv.Itoa(os.Geteuid()))
}

// rootOfHost reports whether this process is the host's root. Root of a user namespace is not, and anybody may write to
// its /run here and there.
func rootOfHost() bool {
	var st unix.Stat_t
	return os.Geteuid() == 0 && unix.Stat("/run", &st) == nil && st.Uid == 0 && unix.Access("/run", unix.W_OK) == nil
}

// PrivateDir makes a directory that is this user's alone, or finds that it is.
func PrivateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return privateState(dir)
}

// claim is the right to run a process on this host, and a directory for what it needs while it lives. The right to a
// container's own process is a lock on its ID, which dies with its holder; that to a further one is its lock in the
// store. A second lock is inherited by each runtime process: one that outlives a killed run ends its work before the next one
// begins.
type claim struct {
	state, dir string
	lock       *os.File // nil for a further process
	working    *os.File
}

func claimDir(state, id string) string  { return filepath.Join(state, "run", id) }
func claimLock(state, id string) string { return filepath.Join(state, "lock", id) }

// claimID takes an ID, or says that it's in use (Unavailable). What a dead process left in the
// directory is still there.
//
// IDs are unique on a host: an ID that a running container of another store uses is taken, too. Owner is the caller's
// container. What is left on the host of a container of another store that has ended is removed.
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
			f.Close() // its last owner has removed it meanwhile
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
	// A further process of an earlier container of that ID may remove the directory while it is empty, see release.
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

// openWorking opens the second lock, which runtimes inherit. In what they start in the container they close it.
func (c *claim) openWorking() (err error) {
	if c.working, err = os.OpenFile(c.path("working"), os.O_RDWR|os.O_CREATE, 0o600); err == nil {
		_, err = unix.FcntlInt(c.working.Fd(), unix.F_SETFD, 0)
	}
	return err
}

// claimHost takes the right to run a process on this host: for the container's own that to its ID. A further process, whose
// lock in the store this process holds, needs a directory alone.
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
	_ = os.Remove(c.path("pid")) // of one that was killed
	return c, nil
}

// quiet waits until no runtime process works on the ID, for ten seconds at most, or two once
// the container is made: made but not started, it keeps the lock until it is removed.
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

// release gives the right up, and removes the directory; the lock's name goes last, and by its owner alone.
//
// A further process may begin while its container ends, and make its directory, which is in the container's, when the
// rest of that has gone. Then the one who is last removes the container's.
func (c *claim) release() {
	if c == nil {
		return
	}
	_ = os.RemoveAll(c.dir)
	if c.lock == nil {
		_ = os.Remove(filepath.Dir(c.dir)) // it is empty only then
	} else {
		_ = os.Remove(c.lock.Name())
	}
	c.close()
}

// close gives the right up and leaves what is in the directory.
func (c *claim) close() {
	if c != nil {
		_ = c.working.Close() // nil is none
		_ = c.lock.Close()
	}
}

// Key is a container's ID for the runtime, which knows no namespaces: the ID itself in the
// namespace default, NAMESPACE+ID in others (no ID has a +).
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

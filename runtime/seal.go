package runtime

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"distkit/disk"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A container that is started does what its record and config.json say: it runs hooks, mounts the host's paths and
// joins networks. Since a store may come from anywhere, a user can start only containers that they have made on this
// host. The seal in the record proves that. It is a code, with a key that only this user has, over the path, inode and
// time of birth of the container's directory, and over the parts of the record that concern the host. So a store that
// was copied, comes from another host, or was written by a stranger has no valid seals. [Container.Trust] makes one.

// sealed is the data that a seal authenticates.
type sealed struct {
	Version   int
	Dir       string
	Inode     uint64
	Born      int64
	Namespace string
	ID        string
	Bundle    string
	Runtime   string
	Network   string
	Connect   *Connection
	Joins     map[specs.LinuxNamespaceType]string `json:",omitempty"`
}

// seal returns the seal of the record in a directory.
func (c *Container) seal(key []byte, dir identity) (string, error) {
	b, err := json.Marshal(sealed{1, c.dir, dir.Inode, dir.Born, c.Namespace, c.ID, c.Bundle, c.Runtime, c.Network, c.Connection, c.Namespaces})
	if err != nil {
		return "", err
	}
	h := hmac.New(sha256.New, key)
	h.Write(b)
	return hex.EncodeToString(h.Sum(nil)), nil
}

// isSealed reports whether the record has a valid seal of this user.
func (c *Container) isSealed() bool {
	dir, err := identify(c.dir)
	return err == nil && c.isSealedIn(dir)
}

// isSealedIn is isSealed of the record in a directory, which is or was at the container's path.
func (c *Container) isSealedIn(dir identity) bool {
	if len(c.Seal) != 2*sha256.Size {
		return false
	}
	for _, name := range keyFiles(c.set.state) {
		if key, err := readKey(name); err == nil {
			if want, err := c.seal(key, dir); err == nil && hmac.Equal([]byte(want), []byte(c.Seal)) {
				return true
			}
		}
	}
	return false
}

// keyFiles lists the files that may hold this user's key, the preferred one first. Their directories survive a boot,
// except the last one, the state directory. Root ignores XDG_STATE_HOME if it is another user's, since sudo may have
// kept that.
func keyFiles(state string) []string {
	var names []string
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) && (os.Geteuid() != 0 || ofRoot(dir)) {
		names = append(names, filepath.Join(dir, "distkit", "key"))
	}
	if rootOfHost() {
		names = append(names, "/var/lib/distkit/key")
	} else if home := os.Getenv("HOME"); filepath.IsAbs(home) {
		names = append(names, filepath.Join(home, ".local/state/distkit/key"))
	}
	return append(names, filepath.Join(state, "key"))
}

// ofRoot reports whether a directory is root's, or would be made in one of root's.
func ofRoot(dir string) bool {
	for {
		var st unix.Stat_t
		err := unix.Stat(dir, &st)
		if !errors.Is(err, unix.ENOENT) || dir == "/" {
			return err == nil && st.Uid == 0
		}
		dir = filepath.Dir(dir)
	}
}

func readKey(name string) ([]byte, error) {
	if err := privateState(filepath.Dir(name)); err != nil {
		return nil, err
	}
	t := disk.Tree(filepath.Dir(name))
	fi, err := t.Stat(filepath.Base(name))
	if err != nil {
		return nil, err
	}
	if st, ok := fi.Sys().(*unix.Stat_t); ok && (int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0) {
		return nil, failed("%s is not this user's alone", name)
	}
	key, err := t.ReadFile(filepath.Base(name), 1024)
	if err == nil && len(key) != sha256.Size {
		err = failed("%s is no key of %d bytes: remove it, and trust your containers anew", name, sha256.Size)
	}
	return key, err
}

// userKey returns this user's key. It makes one if there is none.
func userKey(state string) ([]byte, error) {
	var errs []error
	for _, name := range keyFiles(state) {
		key, err := readKey(name)
		if errors.Is(err, fs.ErrNotExist) {
			if err = makeKey(name); err == nil || errors.Is(err, fs.ErrExist) {
				key, err = readKey(name)
			}
		}
		if err == nil {
			return key, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("key for containers: %w", errors.Join(errs...))
}

// makeKey makes a key. If several processes do so at once, all but one get fs.ErrExist.
func makeKey(name string) error {
	key := make([]byte, sha256.Size)
	_, _ = rand.Read(key) // never fails
	dir := filepath.Dir(name)
	if err := PrivateDir(dir); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "key-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(key)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Link(f.Name(), name)
	}
	if err == nil {
		err = disk.SyncDir(dir)
	}
	return err
}

// Trust accepts a container from elsewhere as this user's own, so that it can be started. The caller must have checked
// its record and its config.json.
func (c *Container) Trust() error {
	lock, err := c.lockRecord()
	if errdefs.IsNotFound(err) {
		return err
	}
	if err != nil {
		return fmt.Errorf("trust container %s: %w", c.ID, err)
	}
	defer lock.Close()
	now, err := c.set.read(c.ID)
	if err != nil {
		return err
	}
	now.own = true
	if err := now.write(); err != nil {
		return fmt.Errorf("trust container %s: %w", c.ID, err)
	}
	*c = *now
	return nil
}

// CheckOwn returns FailedPrecondition for a container that this user has neither made on this host nor trusted. Call it
// before starting a container, or acting on anything of the host that its record names.
func (c *Container) CheckOwn() error {
	if c.own {
		return nil
	}
	return failed("container %s was not made by this user on this host, or was copied or moved since, and may do anything to it: look at its container.json and config.json, then run task trust %s", c.ID, c.ID)
}

// network returns the path of the container's network. It is "" if there is none, or if the record is not this user's.
func (c *Container) network() string {
	if !c.own {
		return ""
	}
	return c.Network
}

package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Secret is a file for a container in [SecretsDir]. The store has only its name. Its content is in memory, in the
// private directory on this host, until the container is removed or the host boots.
type Secret struct {
	Name string
	Data []byte
}

// SecretsDir is the directory with the secrets inside a container.
const SecretsDir = "/run/secrets"

// MaxSecret is the size limit of a secret in bytes, maxSecrets the largest number of secrets of a container.
const (
	MaxSecret  = 1 << 20
	maxSecrets = 32
)

// secretsRoom are the limits of a tmpfs for all secrets of a container, and for one more while a secret is replaced.
var secretsRoom = fmt.Sprintf("mode=755,size=%d,nr_inodes=%d", (maxSecrets+2)*MaxSecret, maxSecrets+8)

// CheckSecrets returns InvalidArgument unless these are valid names, like those of containers, without duplicates.
func CheckSecrets(names []string) error {
	if len(names) > maxSecrets {
		return invalid("%d secrets are too many: a container has %d at most", len(names), maxSecrets)
	}
	for i, name := range names {
		if err := CheckID(name); err != nil {
			return invalid("secret name %.80q: letters, digits and, between them, single ones of . _ - are wanted, %d bytes at most", name, maxIdentifier)
		}
		if slices.Contains(names[:i], name) {
			return invalid("secret %s is given twice", name)
		}
	}
	return nil
}

// secretDir returns the directory on this host for the container's secrets. Its name is the identity of the container's
// directory, which differs from that of any other container, in any store.
func (c *Container) secretDir() (string, error) {
	id, err := identify(c.dir)
	return filepath.Join(c.set.state, "secrets", fmt.Sprintf("%x+%x+%x", id.Device, id.Inode, id.Born)), err
}

// SetSecrets sets the contents of secrets that the container's record names. A running process sees them at once.
// NotFound: the container has no secret of that name. NotImplemented: the state directory is on a disk, where the
// contents would stay, and this user can't mount a tmpfs there.
func (c *Container) SetSecrets(secrets []Secret) error {
	err := c.CheckOwn()
	for _, s := range secrets {
		switch {
		case err != nil:
		case !slices.Contains(c.Secrets, s.Name):
			err = notFound("container %s has no secret %s: it is created with its secrets", c.ID, s.Name)
		case len(s.Data) == 0:
			err = invalid("secret %s is empty", s.Name)
		case len(s.Data) > MaxSecret:
			err = invalid("secret %s has more than %d bytes", s.Name, MaxSecret)
		}
	}
	if err != nil || len(secrets) == 0 {
		return err
	}
	lock, err := c.lockRecord()
	if err != nil {
		return err
	}
	defer lock.Close()
	dir, err := c.secretDir()
	if err == nil {
		err = makeSecretDir(c.set.state, dir)
	}
	for _, s := range secrets {
		if err == nil {
			err = s.write(dir)
		}
	}
	// A concurrent removal deletes the record first, then the secrets.
	if _, rerr := c.set.read(c.ID); errdefs.IsNotFound(rerr) {
		return errors.Join(rerr, removeSecretDir(dir))
	}
	if err != nil {
		return fmt.Errorf("secrets of container %s: %w", c.ID, err)
	}
	return nil
}

// makeSecretDir makes a directory in memory that other users can't reach, unless it exists.
func makeSecretDir(state, dir string) error {
	for _, private := range []string{state, filepath.Dir(dir)} {
		if err := PrivateDir(private); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	if st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC {
		return os.Chmod(dir, 0o755) // whatever the umask is
	}
	if !rootOfHost() {
		_ = os.Remove(dir)
		return errclass.Errorf(errdefs.ErrNotImplemented, "%s is on a disk, where a secret would stay: take another --state, such as one below /dev/shm", state)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, secretsRoom); err != nil {
		return fmt.Errorf("mount a tmpfs on %s: %w", dir, err)
	}
	return nil
}

// write makes or replaces the secret's file, and keeps the owner of the old one.
func (s Secret) write(dir string) error {
	f, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails after the rename
	name := filepath.Join(dir, s.Name)
	_, err = f.Write(s.Data)
	var old unix.Stat_t
	if err == nil && unix.Lstat(name, &old) == nil {
		err = f.Chown(int(old.Uid), int(old.Gid))
	}
	if err == nil {
		err = f.Chmod(0o400)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

// giveSecrets mounts the secrets in the container. Its process can read the files; outside, only root can.
// FailedPrecondition: the content of a secret is gone.
func (c *Container) giveSecrets(s *specs.Spec, users []specs.LinuxIDMapping) error {
	if len(c.Secrets) == 0 {
		return nil
	}
	if err := CheckSecrets(c.Secrets); err != nil {
		return err
	}
	dir, err := c.secretDir()
	if err != nil {
		return err
	}
	var gone []string
	for _, name := range c.Secrets {
		if fi, err := os.Lstat(filepath.Join(dir, name)); err != nil || !fi.Mode().IsRegular() {
			gone = append(gone, name)
		}
	}
	if len(gone) > 0 {
		return failed("its secret %s is gone, as after a boot: give it again with task secret %s %s=FILE", strings.Join(gone, ", "), c.ID, strings.Join(gone, "=FILE "))
	}
	uid, uok := onHost(users, s.Process.User.UID)
	gid, gok := onHost(users, s.Process.User.GID)
	if !uok || !gok {
		return failed("its secrets can't belong to user %d:%d, which its user namespace has no IDs for", s.Process.User.UID, s.Process.User.GID)
	}
	for _, name := range c.Secrets {
		if err := os.Lchown(filepath.Join(dir, name), uid, gid); err != nil {
			return err
		}
	}
	s.Mounts = append(s.Mounts, specs.Mount{
		Destination: SecretsDir, Type: "bind", Source: dir, Options: []string{"bind", "rprivate", "ro", "nosuid", "nodev", "noexec"},
	})
	return nil
}

// onHost returns the host's ID for a user or group of a container, by the maps of its user namespace.
func onHost(maps []specs.LinuxIDMapping, id uint32) (int, bool) {
	if maps == nil {
		return int(id), true
	}
	for _, m := range maps {
		if id >= m.ContainerID && id-m.ContainerID < m.Size {
			return int(m.HostID + (id - m.ContainerID)), true
		}
	}
	return 0, false
}

// removeSecrets removes the directory with the container's secrets.
func (c *Container) removeSecrets() error {
	dir, err := c.secretDir()
	if err != nil {
		return err
	}
	return removeSecretDir(dir)
}

func removeSecretDir(dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	_ = unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) // fails if no tmpfs was needed
	return os.RemoveAll(dir)
}

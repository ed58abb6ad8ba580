package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"distkit/disk"

	"golang.org/x/sys/unix"
)

// Volume is a directory of files that outlives the containers that mount it.
type Volume struct {
	Name       string   `json:"name"`
	Dir        string   `json:"dir"`
	Containers []string `json:"containers"` // IDs of the containers that use it
}

// newVolume is the prefix of names under which volumes are being filled or removed. It is not valid in a volume's name.
const newVolume = ".new-"

// volumeDirs lists the store's directory of volumes, that of the namespace, and, unless name is "", the volume's.
func (s *Containers) volumeDirs(name string) []string {
	dirs := []string{"volumes", filepath.Join("volumes", s.namespace)}
	if name != "" {
		dirs = append(dirs, filepath.Join("volumes", s.namespace, name))
	}
	return dirs
}

// CheckVolume returns InvalidArgument unless name is valid for a volume, by the rule for containers.
func CheckVolume(name string) error {
	if err := CheckID(name); err != nil {
		return invalid("volume name %.80q: letters, digits and, between them, single ones of . _ - are wanted, 76 bytes at most; a path begins with / or ./", name)
	}
	return nil
}

// lockVolumes opens and locks the directory of the namespace's volumes. It waits for the lock unless how has LOCK_NB. A
// process that removes the directory holds the lock, so what lockVolumes returns is the store's current directory. The
// error is fs.ErrNotExist if there is none.
func (s *Containers) lockVolumes(ctx context.Context, how int) (*os.File, error) {
	name := s.volumeDirs("")[1]
	for {
		if err := s.checkDirs(s.volumeDirs("")); err != nil {
			return nil, err
		}
		d, err := s.tree().OpenDir(name)
		if err != nil {
			return nil, err
		}
		if err := disk.LockContext(ctx, d, how); err != nil { // which closes d
			return nil, err
		}
		locked, err := d.Stat()
		if now, serr := os.Lstat(d.Name()); err == nil && serr == nil && os.SameFile(locked, now) {
			return d, nil
		}
		_ = d.Close()
		if err != nil {
			return nil, err
		}
	}
}

// shareVolumes locks the directory of the namespace's volumes, and makes it if need be. Nothing in it is removed while
// it is locked.
func (s *Containers) shareVolumes(ctx context.Context) (*os.File, error) {
	for {
		var err error
		for _, dir := range s.volumeDirs("") {
			if merr := s.makeDir(dir); err == nil && !errors.Is(merr, fs.ErrExist) {
				err = merr
			}
		}
		if err == nil {
			s.sweepVolumes(ctx)
			var lock *os.File
			if lock, err = s.lockVolumes(ctx, unix.LOCK_SH); err == nil {
				return lock, nil
			}
		}
		if !errors.Is(err, fs.ErrNotExist) || ctx.Err() != nil { // otherwise it was removed in between
			return nil, err
		}
	}
}

// Volume returns the directory of a volume. If there is none of that name, it makes one: it calls fill with an empty
// directory, and the volume appears once that is on disk. The caller must have recorded the name in a container's
// record.
func (s *Containers) Volume(ctx context.Context, name string, fill func(dir *os.File) error) (path string, err error) {
	if err := CheckVolume(name); err != nil {
		return "", err
	}
	lock, err := s.shareVolumes(ctx)
	if err != nil {
		return "", fmt.Errorf("volume %s: %w", name, err)
	}
	defer lock.Close()
	for _, dir := range s.volumeDirs("") {
		if err := s.tighten(dir); err != nil {
			return "", fmt.Errorf("volume %s: %w", name, err)
		}
	}
	volume := s.volumeDirs(name)[2]
	fi, err := s.tree().Stat(volume)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = s.makeVolume(volume, fill)
	case err == nil && !fi.IsDir():
		err = failed("%s is not a directory", s.tree().Path(volume))
	}
	if err != nil {
		return "", fmt.Errorf("volume %s: %w", name, err)
	}
	return s.tree().Path(volume), nil
}

// makeVolume makes a volume under a temporary name and renames it, unless another process has made it first.
func (s *Containers) makeVolume(volume string, fill func(dir *os.File) error) (err error) {
	tree, parent := s.tree(), filepath.Dir(volume)
	temporary := filepath.Join(parent, newVolume+NewID())
	if err := tree.Mkdir(temporary, 0o755); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = tree.RemoveAll(temporary)
		}
	}()
	d, err := tree.OpenDir(temporary)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Chmod(0o755); err != nil { // whatever the umask is
		return err
	}
	if err := fill(d); err != nil {
		return err
	}
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	if err := tree.RenameNew(temporary, volume); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return tree.RemoveAll(temporary)
		}
		return err
	}
	return tree.SyncDir(parent)
}

// Volumes lists the volumes of the namespace, sorted by name.
func (s *Containers) Volumes() ([]Volume, error) {
	if err := s.checkDirs(s.volumeDirs("")); err != nil {
		return nil, err
	}
	d, err := s.tree().OpenDir(s.volumeDirs("")[1])
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	users, err := s.volumeUsers()
	var all []Volume
	for _, name := range names {
		if fi, serr := s.tree().Stat(s.volumeDirs(name)[2]); CheckVolume(name) == nil && serr == nil && fi.IsDir() {
			all = append(all, Volume{name, s.tree().Path(s.volumeDirs(name)[2]), append([]string{}, users[name]...)})
		}
	}
	return all, err
}

// volumeUsers returns the containers that use each volume. Records that can't be read are reported by an error, beside
// the map.
func (s *Containers) volumeUsers() (map[string][]string, error) {
	containers, err := s.List(false)
	users := map[string][]string{}
	for _, c := range containers {
		for _, name := range c.Volumes {
			users[name] = append(users[name], c.ID)
		}
	}
	return users, err
}

// RemoveVolume removes a volume with its files. FailedPrecondition: a container uses it. NotFound: there is none.
func (s *Containers) RemoveVolume(ctx context.Context, name string) error {
	if err := CheckVolume(name); err != nil {
		return err
	}
	if err := s.removeVolume(ctx, name); errors.Is(err, fs.ErrNotExist) {
		return notFound("no volume %s", name)
	} else if err != nil {
		return fmt.Errorf("remove volume %s: %w", name, err)
	}
	return nil
}

func (s *Containers) removeVolume(ctx context.Context, name string) error {
	lock, err := s.lockVolumes(ctx, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer lock.Close()
	s.removeStaleVolumes(lock)
	users, err := s.volumeUsers()
	if err != nil {
		return err
	}
	if len(users[name]) > 0 {
		return failed("it is used by %s", strings.Join(users[name], ", "))
	}
	gone := filepath.Join(s.volumeDirs("")[1], newVolume+NewID())
	if err := s.tree().Rename(s.volumeDirs(name)[2], gone); err != nil {
		return err
	}
	if err := s.tree().RemoveAll(gone); err != nil {
		return err
	}
	for _, dir := range slices.Backward(s.volumeDirs("")) {
		_ = s.tree().RemoveDir(dir) // fails unless it is empty
	}
	return nil
}

// sweepVolumes removes what killed processes have left, unless another process is making or removing a volume.
func (s *Containers) sweepVolumes(ctx context.Context) {
	if lock, err := s.lockVolumes(ctx, unix.LOCK_EX|unix.LOCK_NB); err == nil {
		s.removeStaleVolumes(lock)
		_ = lock.Close()
	}
}

// removeStaleVolumes removes what killed processes have left. The caller holds the exclusive lock, so nobody is making
// a volume.
func (s *Containers) removeStaleVolumes(locked *os.File) {
	names, _ := locked.Readdirnames(-1)
	for _, name := range names {
		if strings.HasPrefix(name, newVolume) {
			_ = s.tree().RemoveAll(s.volumeDirs(name)[2])
		}
	}
}

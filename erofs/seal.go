package erofs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A seal records that we have made or verified a file. Seals are kept outside of the store, since a stranger may have
// written that: in a directory that only root can access. It is on a tmpfs, so that after a boot everything is verified
// again: the disk may have been changed meanwhile. A seal names its file by inode, size and times. Among these is the
// time of change, which no user can set.

// sealDir is the directory of seals, after its parent.
var sealDir = []string{"/run/distkit", "/run/distkit/erofs"}

const maxSeal = 4 << 20

// Identity returns a text that changes if the file is changed or replaced.
func Identity(f *os.File) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return fmt.Sprintf("%x:%x %d %d %d", st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()), nil
}

func seals() (disk.Tree, error) {
	parent, dir := sealDir[0], sealDir[1]
	if os.Geteuid() == 0 {
		_ = os.Mkdir(parent, 0o700)
		if disk.PrivateDir(dir) { // containers' users may search the parent, where they find nothing
			return disk.Tree(dir), nil
		}
	}
	return "", errclass.Errorf(errdefs.ErrPermissionDenied, "%s is not a directory of root's alone: what was verified can't be recorded", dir)
}

// sealName returns the name of the seal for an identity.
func sealName(identity string) string {
	inode, _, _ := strings.Cut(identity, " ")
	return inode
}

// Seal records a text about an open file. ErrPermissionDenied: this user has no directory for seals.
func Seal(f *os.File, text string) error {
	dir, err := seals()
	if err != nil {
		return err
	}
	identity, err := Identity(f)
	if err != nil {
		return err
	}
	return dir.Replace(sealName(identity), []byte(identity+"\n"+text), 0o600, false)
}

// Sealed returns the text that Seal recorded about a file. It is "" if there is none, or if the file has changed since.
func Sealed(f *os.File) (string, error) {
	dir, err := seals()
	if err != nil {
		return "", err
	}
	identity, err := Identity(f)
	if err != nil {
		return "", err
	}
	b, err := dir.ReadFile(sealName(identity), maxSeal)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	text, ok := strings.CutPrefix(string(b), identity+"\n")
	if !ok {
		return "", nil
	}
	return text, nil
}

// Unseal removes the seal of a file that is about to be deleted.
func Unseal(f *os.File) {
	dir, err := seals()
	if err != nil {
		return
	}
	if identity, err := Identity(f); err == nil {
		_ = dir.Remove(sealName(identity))
	}
}

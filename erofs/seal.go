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

// A seal says that a file is what we have made or verified. It is kept outside of the store, which may be a stranger's, in a directory
// that is root's alone and dies with the boot: so what was changed while the machine was off is verified again. It names the file by
// its inode, size and times, of which no user can set the time of change.

// sealDir is where seals are.
var sealDir = []string{"/run/distkit", "/run/distkit/erofs"}

const maxSeal = 4 << 20

// Identity returns what tells a file from one that was changed or put in its place.
func Identity(f *os.File) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return fmt.Sprintf("%x:%x %d %d %d", st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()), nil
}

func seals() (disk.Tree, error) {
	for _, dir := range sealDir {
		if os.Geteuid() != 0 || !disk.PrivateDir(dir) {
			return "", errclass.Errorf(errdefs.ErrPermissionDenied, "%s is not a directory of root's alone: what was verified can't be recorded", dir)
		}
	}
	return disk.Tree(sealDir[len(sealDir)-1]), nil
}

// sealName returns the name of the seal of a file of that identity.
func sealName(identity string) string {
	inode, _, _ := strings.Cut(identity, " ")
	return inode
}

// Seal records a text about an open file. ErrPermissionDenied: this user has no place for seals.
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

// Sealed returns the text that Seal has recorded about a file, or "" if there is none or the file was changed.
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

// Unseal removes the seal of a file that is to be deleted.
func Unseal(f *os.File) {
	dir, err := seals()
	if err != nil {
		return
	}
	if identity, err := Identity(f); err == nil {
		_ = dir.Remove(sealName(identity))
	}
}

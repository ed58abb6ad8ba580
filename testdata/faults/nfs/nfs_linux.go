// Package nfs mounts a directory by FUSE with the locks, removals and renames of an NFSv4 client. Programs that must work on NFS can so be
// tested on a kernel without it.
//
// An exclusive flock(2) needs a descriptor that is open for writing. Locks exclude those of other mounts of the directory. A
// file that is removed, or renamed over, while this mount has it open gets the name .nfsNUMBER until it is closed
// ("silly rename"). Its directory can't be removed before that. Times and modes are those of the directory's own file system.
package nfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// serverEnv is set in the environment of a process of the test's binary that serves a mount.
const serverEnv = "FAULTS_NFS_SERVER"

// Main serves the mount if this process was started by Mount, and exits. It must be the first call of TestMain.
func Main() {
	if os.Getenv(serverEnv) != "" {
		if err := serve(os.Args[1], os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "nfs:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// Mount mounts a directory at a mount point until unmount is called. The server is a process of its own: this one waits for calls that
// the server answers, and a process that does both could block itself.
func Mount(source, target string) (unmount func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := exec.Command(self, source, target)
	c.Env = append(os.Environ(), serverEnv+"=1")
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ready, err := c.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(ready, make([]byte, 1)); err != nil {
		return nil, errors.Join(err, c.Wait())
	}
	return func() error {
		err := unix.Unmount(target, unix.MNT_DETACH|unix.MNT_FORCE) // which ends the server, though a mount namespace of another process has a copy
		return errors.Join(err, c.Wait())
	}, nil
}

func serve(source, target string) error {
	root := &fs.LoopbackRoot{Path: source}
	top := &node{&fs.LoopbackNode{RootData: root}}
	root.RootNode = top
	server, err := fs.Mount(target, top, &fs.Options{MountOptions: fuse.MountOptions{
		FsName: "nfs-like", DirectMountStrict: true, AllowOther: true, EnableLocks: true, Options: []string{"default_permissions"},
	}})
	if err != nil {
		return err
	}
	_, _ = os.Stdout.Write([]byte{1})
	server.Wait()
	return nil
}

// node is a file or directory of the mount.
type node struct{ *fs.LoopbackNode }

// WrapChild makes a node of each file and directory.
func (n *node) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	return &node{ops.(*fs.LoopbackNode)}
}

// path returns the node's path in the source.
func (n *node) path() string { return filepath.Join(n.RootData.Path, n.Path(n.Root())) }

func (n *node) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	f, err := os.OpenFile(n.path(), int(flags)&^(unix.O_APPEND|unix.O_CREAT|unix.O_EXCL), 0)
	if err != nil {
		return nil, 0, fs.ToErrno(err)
	}
	return newHandle(f, flags), 0, 0
}

func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	child, made, _, errno := n.LoopbackNode.Create(ctx, name, flags, mode, out)
	if errno != 0 {
		return nil, nil, 0, errno
	}
	defer made.(fs.FileReleaser).Release(ctx)
	f, err := os.OpenFile(filepath.Join(n.path(), name), int(flags)&unix.O_ACCMODE, 0)
	if err != nil {
		return nil, nil, 0, fs.ToErrno(err)
	}
	return child, newHandle(f, flags), 0, 0
}

func (n *node) Unlink(_ context.Context, name string) syscall.Errno {
	path := filepath.Join(n.path(), name)
	if aside(path) {
		return 0
	}
	return fs.ToErrno(syscall.Unlink(path))
}

func (n *node) Rename(_ context.Context, name string, parent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	from, to := filepath.Join(n.path(), name), filepath.Join(parent.(*node).path(), newName)
	if flags&unix.RENAME_NOREPLACE == 0 && aside(to) {
		time.Sleep(roundTrip) // meanwhile other clients see neither the old file nor the new one
	}
	return fs.ToErrno(unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, uint(flags)))
}

// open counts the handles of each file. aside has the new path of each open file that was renamed instead of being removed.
var open = struct {
	sync.Mutex
	handles map[inode]int
	aside   map[inode]string
}{handles: map[inode]int{}, aside: map[inode]string{}}

type inode struct{ dev, ino uint64 }

func inodeOf(st *syscall.Stat_t) inode { return inode{uint64(st.Dev), st.Ino} }

// roundTrip is how long an NFS server takes to answer.
const roundTrip = 2 * time.Millisecond

var asides atomic.Int64

// aside renames a file to .nfsNUMBER if it is open, and reports whether it did.
func aside(path string) bool {
	open.Lock()
	defer open.Unlock()
	var st syscall.Stat_t
	if syscall.Lstat(path, &st) != nil || st.Mode&syscall.S_IFMT != syscall.S_IFREG || open.handles[inodeOf(&st)] == 0 {
		return false
	}
	name := filepath.Join(filepath.Dir(path), fmt.Sprintf(".nfs%d.%d", os.Getpid(), asides.Add(1)))
	if os.Rename(path, name) != nil {
		return false
	}
	open.aside[inodeOf(&st)] = name
	return true
}

// handle is an open file.
type handle struct {
	*fs.LoopbackFile
	lock    *os.File // the same open file: a lock of the mount is held by it
	inode   inode
	writing bool
	closed  sync.Once
}

func newHandle(f *os.File, flags uint32) *handle {
	var st syscall.Stat_t
	_ = syscall.Fstat(int(f.Fd()), &st)
	h := &handle{LoopbackFile: fs.NewLoopbackFileFromOS(f), lock: f, inode: inodeOf(&st), writing: flags&unix.O_ACCMODE != unix.O_RDONLY}
	open.Lock()
	defer open.Unlock()
	open.handles[h.inode]++
	return h
}

// Flush is called when a descriptor is closed, before close(2) returns. The kernel calls Release some time later, which is too late. A file
// whose descriptor is shared counts as closed too early.
func (h *handle) Flush(ctx context.Context) syscall.Errno {
	errno := h.LoopbackFile.Flush(ctx)
	h.closed.Do(func() {
		open.Lock()
		defer open.Unlock()
		if open.handles[h.inode]--; open.handles[h.inode] == 0 {
			delete(open.handles, h.inode)
			if name, ok := open.aside[h.inode]; ok {
				delete(open.aside, h.inode)
				_ = os.Remove(name)
			}
		}
	})
	return errno
}

func (h *handle) Setlk(ctx context.Context, _ uint64, lk *fuse.FileLock, _ uint32) syscall.Errno {
	how := unix.LOCK_UN
	switch {
	case lk.Typ == unix.F_RDLCK:
		how = unix.LOCK_SH
	case lk.Typ == unix.F_WRLCK && !h.writing:
		return syscall.EBADF
	case lk.Typ == unix.F_WRLCK:
		how = unix.LOCK_EX
	}
	return fs.ToErrno(unix.Flock(int(h.lock.Fd()), how|unix.LOCK_NB))
}

// Setlkw polls, so that a signal can end the wait.
func (h *handle) Setlkw(ctx context.Context, owner uint64, lk *fuse.FileLock, flags uint32) syscall.Errno {
	for {
		if errno := h.Setlk(ctx, owner, lk, flags); errno != syscall.EAGAIN {
			return errno
		}
		select {
		case <-ctx.Done():
			return syscall.EINTR
		case <-time.After(2 * time.Millisecond):
		}
	}
}

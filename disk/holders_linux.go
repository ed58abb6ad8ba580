package disk

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
)

// Holders returns the processes that hold a lock on an open file, as far as the kernel tells. It can't show processes
// of another PID namespace. A process that inherited the lock is shown only if this user may read its descriptors in
// /proc.
func Holders(f *os.File) []Process {
	var st unix.Stat_t
	if retry(func() error { return unix.Fstat(int(f.Fd()), &st) }) != nil {
		return nil
	}
	locks, err := os.Open("/proc/locks")
	if err != nil {
		return nil
	}
	defer locks.Close()
	device := deviceOf(f, uint64(st.Dev))
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(device), unix.Minor(device), st.Ino)
	var all []Process
	for lines := bufio.NewScanner(locks); lines.Scan(); {
		// proc_locks(5): "17: FLOCK  ADVISORY  WRITE 4711 fe:00:4222 0 EOF", or "17: -> FLOCK …" for a process that
		// waits.
		words := strings.Fields(lines.Text())
		if len(words) < 6 || words[1] != "FLOCK" || words[5] != file {
			continue
		}
		pid, err := strconv.Atoi(words[4])
		switch {
		case err != nil || pid <= 0:
		case hasOpen(pid, &st):
			all = append(all, process(pid))
		default: // the process exited, or closed the file, but another one inherited it
			all = append(all, inheritors(&st)...)
		}
	}
	slices.SortFunc(all, func(a, b Process) int { return a.PID - b.PID })
	return slices.Compact(all)
}

// deviceOf returns the device number by which /proc/locks identifies a file, or otherwise if it can't be read. stat(2)
// gives another number on btrfs and overlayfs.
func deviceOf(f *os.File, otherwise uint64) uint64 {
	b, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(int(f.Fd())))
	if err != nil {
		return otherwise
	}
	_, id, _ := strings.Cut(string(b), "mnt_id:")
	id, _, _ = strings.Cut(id, "\n")
	id = strings.TrimSpace(id)
	mounts, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return otherwise
	}
	defer mounts.Close()
	for lines := bufio.NewScanner(mounts); lines.Scan(); {
		words := strings.SplitN(lines.Text(), " ", 4)
		var major, minor uint32
		if len(words) == 4 && words[0] == id {
			if _, err := fmt.Sscanf(words[2], "%d:%d", &major, &minor); err == nil {
				return unix.Mkdev(major, minor)
			}
		}
	}
	return otherwise
}

// hasOpen reports whether a process has the file open. It assumes so if this user may not read the process's
// descriptors.
func hasOpen(pid int, file *unix.Stat_t) bool {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	d, err := os.Open(dir)
	if err != nil {
		return !os.IsNotExist(err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return !os.IsNotExist(err)
	}
	return slices.ContainsFunc(names, func(name string) bool {
		var st unix.Stat_t
		return retry(func() error { return unix.Stat(filepath.Join(dir, name), &st) }) == nil && st.Dev == file.Dev && st.Ino == file.Ino
	})
}

// inheritors returns the other processes that have the file open and whose descriptors this user may read.
func inheritors(file *unix.Stat_t) []Process {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	var all []Process
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == os.Getpid() {
			continue
		}
		if fd, err := os.Open(filepath.Join("/proc", name, "fd")); err == nil { // skips those that this user may not read
			_ = fd.Close()
			if hasOpen(pid, file) {
				all = append(all, process(pid))
			}
		}
	}
	return all
}

func process(pid int) Process {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "comm"))
	if err != nil {
		return Process{pid, "?"}
	}
	name := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) && r != unicode.ReplacementChar {
			return r
		}
		return '?'
	}, strings.TrimSuffix(string(b), "\n"))
	return Process{pid, name}
}

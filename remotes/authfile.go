package remotes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"distkit/disk"
	ondisk "distkit/disk/layout"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// editAuthFile replaces a credential file by the result of edit: atomically, with mode 0600, and under a lock of its
// directory against a concurrent login. If name is a symbolic link, its target is replaced.
func editAuthFile(ctx context.Context, name string, edit func(authFile, []byte) ([]byte, error)) error {
	if target, err := filepath.EvalSymlinks(name); err == nil {
		name = target
	}
	dir := filepath.Dir(name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	lock, err := os.Open(dir)
	if err != nil {
		return err
	}
	if err := disk.LockContext(ctx, lock, unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", dir, err)
	}
	defer disk.Release(lock)
	was, err := os.Stat(name)
	var before []byte
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return err
	case !was.Mode().IsRegular():
		return classf(errdefs.ErrInvalidArgument, "%s is not a regular file: credentials can't be written there", name)
	default:
		if before, err = readAuthFile(name); err != nil {
			return err
		}
	}
	b := before
	if len(bytes.TrimSpace(b)) == 0 {
		b = []byte("{}\n")
	}
	f, err := parseAuthFile(name, b)
	if err != nil {
		return classf(errdefs.ErrInvalidArgument, "%w: it was not changed", err)
	}
	if b, err = edit(f, b); err != nil || bytes.Equal(b, before) {
		return err
	}
	if err := disk.Replace(name, b, 0o600, true); err != nil {
		return err
	}
	if was == nil || os.Geteuid() != 0 {
		return nil
	}
	st := was.Sys().(*syscall.Stat_t)
	return os.Chown(name, int(st.Uid), int(st.Gid))
}

// setMember sets a member of the JSON object b. All other bytes stay unchanged.
func setMember(b []byte, name string, value []byte, indent string) ([]byte, error) {
	count, found := 0, false
	b, err := editMembers(b, func(key string, old json.RawMessage) []byte {
		count++
		if key != name {
			return old
		}
		found = true
		return value
	})
	if err != nil || found {
		return b, err
	}
	quoted, err := json.Marshal(name)
	if err != nil {
		return nil, err
	}
	text := string(quoted) + ": " + string(value)
	open, end := bytes.IndexByte(b, '{')+1, bytes.LastIndexByte(b, '}')
	if count == 0 {
		return slices.Concat(b[:open], []byte("\n"+indent+"\t"+text+"\n"+indent), b[end:]), nil
	}
	space := b[open : open+bytes.IndexByte(b[open:], '"')]
	last := len(bytes.TrimRight(b[:end], " \t\r\n"))
	return slices.Concat(b[:last], []byte{','}, space, []byte(text), b[last:]), nil
}

// editMembers is [ondisk.EditMembers], but returns an error if b is not a JSON object.
func editMembers(b []byte, f func(key string, value json.RawMessage) []byte) ([]byte, error) {
	if !bytes.HasPrefix(bytes.TrimSpace(b), []byte{'{'}) {
		return nil, errors.New("it is not a JSON object")
	}
	return ondisk.EditMembers(b, f), nil
}

// authsOf returns the object "auths" of a credential file, or an empty object.
func authsOf(b []byte) ([]byte, error) {
	found := []byte("{}")
	_, err := editMembers(b, func(key string, value json.RawMessage) []byte {
		if key == "auths" && string(value) != "null" {
			found = value
		}
		return value
	})
	return found, err
}

func setAuth(b []byte, key string, entry []byte) ([]byte, error) {
	object, err := authsOf(b)
	if err == nil {
		object, err = setMember(object, key, entry, "\t")
	}
	if err != nil {
		return nil, err
	}
	return setMember(b, "auths", object, "")
}

func removeAuths(b []byte, keys []string) ([]byte, error) {
	if len(keys) == 0 {
		return b, nil
	}
	object, err := authsOf(b)
	if err == nil {
		object, err = editMembers(object, func(key string, value json.RawMessage) []byte {
			if slices.Contains(keys, key) {
				return nil
			}
			return value
		})
	}
	if err != nil {
		return nil, err
	}
	return setMember(b, "auths", object, "")
}

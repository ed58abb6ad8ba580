package remotes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"distkit/disk"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// editAuthFile replaces an auth file by what edit makes of it: at once, with mode 0600, and under a lock of its directory
// against another login. What a symbolic link leads to is replaced, not the link.
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
		return classf(errdefs.ErrInvalidArgument, "%s is not a file: credentials can't be written there", name)
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
		return classf(errdefs.ErrInvalidArgument, "%w: it is left as it is", err)
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

// member is one of a JSON object: where its name begins, and its value.
type member struct {
	name           string
	at, start, end int
}

// members lists those of the object b, which may stand between white space.
func members(b []byte) (list []member, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("it is not a JSON object")
	}
	for d.More() {
		from := int(d.InputOffset())
		name, err := d.Token()
		if err != nil {
			return nil, err
		}
		m := member{at: from + bytes.IndexByte(b[from:], '"')}
		m.name, _ = name.(string)
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, err
		}
		m.end = int(d.InputOffset())
		m.start = m.end - len(value)
		list = append(list, m)
	}
	return list, nil
}

// setMember sets a member of the object b. Every other byte stays as it is.
func setMember(b []byte, name string, value []byte, indent string) ([]byte, error) {
	list, err := members(b)
	if err != nil {
		return nil, err
	}
	for _, m := range list {
		if m.name == name {
			return splice(b, m.start, m.end, value), nil
		}
	}
	quoted, err := json.Marshal(name)
	if err != nil {
		return nil, err
	}
	text := string(quoted) + ": " + string(value)
	if len(list) == 0 {
		open, end := bytes.IndexByte(b, '{'), bytes.LastIndexByte(b, '}')
		return splice(b, open+1, end, []byte("\n"+indent+"\t"+text+"\n"+indent)), nil
	}
	last := list[len(list)-1]
	space := last.at - len(bytes.TrimRight(b[:last.at], " \t\r\n"))
	return splice(b, last.end, last.end, []byte(","+string(b[last.at-space:last.at])+text)), nil
}

// removeMembers removes those of the object b that have one of the names.
func removeMembers(b []byte, names []string) ([]byte, error) {
	for {
		list, err := members(b)
		if err != nil {
			return nil, err
		}
		i := -1
		for j, m := range list {
			for _, name := range names {
				if m.name == name {
					i = j
				}
			}
		}
		switch {
		case i < 0:
			return b, nil
		case i > 0:
			b = splice(b, list[i-1].end, list[i].end, nil)
		case len(list) > 1:
			b = splice(b, list[0].at, list[1].at, nil)
		default:
			b = splice(b, bytes.IndexByte(b, '{')+1, bytes.LastIndexByte(b, '}'), nil)
		}
	}
}

func splice(b []byte, from, to int, by []byte) []byte {
	return bytes.Join([][]byte{b[:from], by, b[to:]}, nil)
}

// authsOf returns the object "auths" of an auth file.
func authsOf(b []byte) ([]byte, error) {
	list, err := members(b)
	if err != nil {
		return nil, err
	}
	found := []byte("{}")
	for _, m := range list {
		if value := b[m.start:m.end]; m.name == "auths" && string(value) != "null" {
			found = value
		}
	}
	return found, nil
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
		object, err = removeMembers(object, keys)
	}
	if err != nil {
		return nil, err
	}
	return setMember(b, "auths", object, "")
}

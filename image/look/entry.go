package look

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"distkit/layer"
	"distkit/layer/tree"
)

// An Entry describes the file that an image or a layer has at a path.
type Entry struct {
	Path    string // absolute, with a slash at the beginning
	Type    Type
	Perm    uint16 // the mode without its type
	UID     int
	GID     int
	Size    int64 // of a regular file's content, or of a symbolic link's target
	ModTime time.Time
	Links   uint32 // the number of the file's names; 0 in a list of a layer's entries
	Target  string // of a symbolic link, or of a hard link: the path of the file
	Device  [2]int64
	Xattrs  []layer.Xattr
	Layer   int    // the layer that has the entry, or wrote the file last, from 1 on; 0 for a root directory without an entry
	Change  string // A, C or D, in a list of changes

	sum sum // of a regular file, if contents are hashed
}

// A Type is the type of an entry.
type Type string

// Types of entries. The last three are for lists of a layer's entries.
const (
	File      Type = "file"
	Directory Type = "directory"
	Symlink   Type = "symlink"
	Char      Type = "char"
	Block     Type = "block"
	FIFO      Type = "fifo"
	Hardlink  Type = "hardlink"
	Whiteout  Type = "whiteout"
	Opaque    Type = "opaque"
)

var types = map[tree.Kind]Type{tree.Regular: File, tree.Dir: Directory, tree.Symlink: Symlink, tree.Char: Char, tree.Block: Block, tree.FIFO: FIFO}

var flags = map[byte]Type{tar.TypeReg: File, tar.TypeCont: File, tar.TypeGNUSparse: File, tar.TypeDir: Directory, tar.TypeSymlink: Symlink,
	tar.TypeChar: Char, tar.TypeBlock: Block, tar.TypeFifo: FIFO, tar.TypeLink: Hardlink}

// letters are the first letters of modes, as ls(1) and tar(1) print them. w is BSD's letter for a whiteout.
var letters = map[Type]byte{File: '-', Directory: 'd', Symlink: 'l', Char: 'c', Block: 'b', FIFO: 'p', Hardlink: 'h', Whiteout: 'w', Opaque: 'o'}

// ModeString returns the type and the permissions as ls -l writes them.
func (e *Entry) ModeString() string {
	b := []byte("?rwxrwxrwx")
	if l, ok := letters[e.Type]; ok {
		b[0] = l
	}
	for i := range 9 {
		if e.Perm>>(8-i)&1 == 0 {
			b[1+i] = '-'
		}
	}
	for i, special := range []byte("sst") { // set-user-ID, set-group-ID and sticky replace an x
		at := 3 + 3*i
		switch on, x := e.Perm>>(11-i)&1 != 0, b[at] == 'x'; {
		case on && x:
			b[at] = special
		case on:
			b[at] = special - 'a' + 'A'
		}
	}
	return string(b)
}

// MarshalJSON adds names that are not UTF-8 in Base64, as pathBytes and targetBytes. It leaves out a time that JSON
// can't represent.
func (e *Entry) MarshalJSON() ([]byte, error) {
	v := struct {
		Change      string            `json:"change,omitempty"`
		Path        string            `json:"path"`
		PathBytes   []byte            `json:"pathBytes,omitempty"`
		Type        Type              `json:"type"`
		Mode        string            `json:"mode,omitempty"`
		UID         int               `json:"uid"`
		GID         int               `json:"gid"`
		Size        int64             `json:"size"`
		ModTime     *time.Time        `json:"mtime,omitempty"`
		Links       uint32            `json:"links,omitempty"`
		Target      string            `json:"target,omitempty"`
		TargetBytes []byte            `json:"targetBytes,omitempty"`
		Device      string            `json:"device,omitempty"`
		Xattrs      map[string][]byte `json:"xattrs,omitempty"`
		Layer       int               `json:"layer,omitempty"`
	}{Change: e.Change, Path: e.Path, Type: e.Type, UID: e.UID, GID: e.GID, Size: e.Size, Links: e.Links, Target: e.Target, Layer: e.Layer}
	if e.Type != Whiteout && e.Type != Opaque {
		v.Mode = fmt.Sprintf("%04o", e.Perm)
		if y := e.ModTime.Year(); y >= 0 && y <= 9999 { // RFC 3339 has no other years
			v.ModTime = &e.ModTime
		}
	}
	if !utf8.ValidString(e.Path) {
		v.PathBytes = []byte(e.Path)
	}
	if !utf8.ValidString(e.Target) {
		v.TargetBytes = []byte(e.Target)
	}
	if e.Type == Char || e.Type == Block {
		v.Device = fmt.Sprintf("%d:%d", e.Device[0], e.Device[1])
	}
	for _, x := range e.Xattrs {
		if v.Xattrs == nil {
			v.Xattrs = map[string][]byte{}
		}
		v.Xattrs[x.Name] = x.Value
	}
	return json.Marshal(v)
}

// EntryOf describes an entry of a layer, as it is in the archive. InvalidArgument: its attributes can't be parsed.
func EntryOf(h *tar.Header) (*Entry, error) {
	e := &Entry{Path: "/" + layer.Clean(h.Name), Type: flags[h.Typeflag], Perm: uint16(h.Mode & 0o7777), UID: h.Uid, GID: h.Gid, Size: h.Size,
		ModTime: h.ModTime.UTC(), Device: [2]int64{h.Devmajor, h.Devminor}}
	dir, base := layer.Split(e.Path)
	switch {
	case base == layer.OpaqueMarker:
		return &Entry{Path: "/" + strings.TrimPrefix(dir, "/"), Type: Opaque}, nil
	case strings.HasPrefix(base, layer.WhiteoutPrefix) && !strings.HasPrefix(base, layer.MetaPrefix):
		return &Entry{Path: dir + "/" + strings.TrimPrefix(base, layer.WhiteoutPrefix), Type: Whiteout}, nil
	}
	switch e.Type {
	case Symlink:
		e.Target, e.Size = h.Linkname, int64(len(h.Linkname))
	case Hardlink:
		e.Target, e.Size = "/"+layer.Clean(h.Linkname), 0
	case File:
	default:
		e.Size = 0
	}
	var err error
	e.Xattrs, err = layer.Xattrs(h.PAXRecords)
	return e, err
}

package layer

import (
	"archive/tar"
	"bytes"
	"cmp"
	"encoding/base64"
	"net/url"
	"path"
	"slices"
	"strings"
)

const (
	// WhiteoutPrefix begins the name of an entry that deletes the file of the rest of the name from the layers below.
	WhiteoutPrefix = ".wh."
	// MetaPrefix begins names that aufs kept for itself.
	MetaPrefix = ".wh..wh."
	// OpaqueMarker is the name of an entry that deletes all that the layers below have in its directory.
	OpaqueMarker = ".wh..wh..opq"

	// MaxPath is the most bytes that a path may have: PATH_MAX without its NUL.
	MaxPath = 4095

	// MaxSparse bounds the sizes of a layer's sparse files together, in bytes: their holes cost
	// it nothing, but whoever reads through them time. A gzip layer of 1 GiB can hold as much.
	MaxSparse = 1 << 40
)

// Clean makes a name of an archive relative to the root: "" is the root itself. What leads above it stops there, as at the root of a
// file system.
func Clean(name string) string {
	return path.Clean("/" + name)[1:]
}

// Split parts a cleaned path into that of the directory and the name in it.
func Split(p string) (dir, base string) {
	i := strings.LastIndexByte(p, '/')
	if i < 0 {
		return "", p
	}
	return p[:i], p[i+1:]
}

// Sparse reports whether an entry is an archive's form of a file with holes.
func Sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// An Xattr is an extended attribute.
type Xattr struct {
	Name  string
	Value []byte
}

// Kind returns the kind of an attribute for reports of what can't be set, as in "user attributes". There are few kinds: a layer can't
// fill a map of them, or choose what a report says.
func (x *Xattr) Kind() string {
	switch class, _, _ := strings.Cut(x.Name, "."); class {
	case "SCHILY":
		return "ACLs"
	case "user", "trusted", "security", "system":
		return class + " attributes"
	}
	return "other attributes"
}

// OverlayName returns the name of an extended attribute of overlayfs without its prefix. ok is false for every other attribute.
func OverlayName(name string) (rest string, ok bool) {
	for _, p := range []string{"trusted.overlay.", "user.overlay."} {
		if rest, ok := strings.CutPrefix(name, p); ok {
			return rest, true
		}
	}
	return "", false
}

// XattrRecord begins the keyword of a PAX record of an extended attribute, as star and GNU tar write it.
const XattrRecord = "SCHILY.xattr."

// As GNU tar and bsdtar do: a record's keyword ends at the first "=", so that is escaped, and so is what would be taken for an escape.
var unescapeName = strings.NewReplacer("%3D", "=", "%25", "%")

// EscapeName returns the name of an extended attribute as it follows XattrRecord.
func EscapeName(name string) string {
	if strings.Contains(name, "%3D") || strings.Contains(name, "%25") {
		name = strings.ReplaceAll(name, "%", "%25")
	}
	return strings.ReplaceAll(name, "=", "%3D")
}

// Xattrs returns the extended attributes among PAX records, as star and GNU tar write them or,
// where those are missing, libarchive: sorted by name. Several records can name one attribute, in different escapes: it has the first of their
// values, in the order of bytes. One whose name or value can't be decoded is ErrInvalidArgument. An ACL that
// no attribute repeats, as Solaris's tar writes it, is listed by its record's keyword, without a value. Nothing in the list is a part of
// records, which may be far longer.
func Xattrs(records map[string]string) ([]Xattr, error) {
	var list []Xattr
	for k, v := range records {
		if name, ok := strings.CutPrefix(k, XattrRecord); ok {
			list = append(list, Xattr{unescapeName.Replace(name), []byte(v)})
		} else if kind, ok := strings.CutPrefix(k, "SCHILY.acl."); ok {
			_, both := records[XattrRecord+"system.posix_acl_"+kind]
			if !both && (kind != "access" || strings.Contains(v, "mask:")) { // else it says what the mode says
				list = append(list, Xattr{strings.Clone(k), nil})
			}
		} else if escaped, ok := strings.CutPrefix(k, "LIBARCHIVE.xattr."); ok {
			name, err := url.PathUnescape(escaped)
			if err != nil {
				return nil, refused("attribute %.200q: %w", escaped, err)
			}
			if _, both := records[XattrRecord+EscapeName(name)]; both {
				continue
			}
			value, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(v, "="))
			if err != nil {
				return nil, refused("attribute %.200q: %w", name, err)
			}
			list = append(list, Xattr{strings.Clone(name), value})
		}
	}
	slices.SortFunc(list, func(a, b Xattr) int { return cmp.Or(strings.Compare(a.Name, b.Name), bytes.Compare(a.Value, b.Value)) })
	return slices.CompactFunc(list, func(a, b Xattr) bool { return a.Name == b.Name }), nil
}

// LinkTarget returns the cleaned path of the file that a hard link's entry names. InvalidArgument: no entry may name it.
func LinkTarget(h *tar.Header) (string, error) {
	if h.Linkname == "" || len(h.Linkname) > MaxPath {
		return "", refused("hard link to a name of %d bytes", len(h.Linkname))
	}
	target := Clean(h.Linkname)
	switch target {
	case Clean(h.Name):
		return "", refused("hard link to itself")
	case "":
		return "", refused("hard link to the root directory")
	}
	return target, nil
}

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
	// WhiteoutPrefix begins the name of a whiteout. A whiteout deletes the file with the rest of the name from the
	// lower layers.
	WhiteoutPrefix = ".wh."
	// MetaPrefix begins the names that aufs reserves for itself.
	MetaPrefix = ".wh..wh."
	// OpaqueMarker is the name of an entry that deletes everything that lower layers have in its directory.
	OpaqueMarker = ".wh..wh..opq"

	// MaxPath is the longest path in bytes: PATH_MAX without the NUL.
	MaxPath = 4095

	// MaxSparse bounds the sizes of a layer's sparse files together, in bytes. Holes make a layer no larger, but
	// whoever reads through them spends time. A gzip layer of 1 GiB can decompress to as much.
	MaxSparse = 1 << 40
)

// Clean makes the name of an entry relative to the root. The root itself is "". As at the root of a file system, ".."
// never leads above it.
func Clean(name string) string {
	return path.Clean("/" + name)[1:]
}

// Split splits a cleaned path into the path of the directory and the last name.
func Split(p string) (dir, base string) {
	i := strings.LastIndexByte(p, '/')
	if i < 0 {
		return "", p
	}
	return p[:i], p[i+1:]
}

// Sparse reports whether an entry is a sparse file, in any of the formats for them.
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

// Kind returns the kind of the attribute, as in "user attributes", for reports of what could not be set. The kinds are
// few and fixed. So a layer can't choose what a report says, or make it long.
func (x *Xattr) Kind() string {
	switch class, _, _ := strings.Cut(x.Name, "."); class {
	case "SCHILY":
		return "ACLs"
	case "user", "trusted", "security", "system":
		return class + " attributes"
	}
	return "other attributes"
}

// OverlayName returns the name of an overlayfs attribute without its prefix. ok is false for any other attribute.
func OverlayName(name string) (rest string, ok bool) {
	for _, p := range []string{"trusted.overlay.", "user.overlay."} {
		if rest, ok := strings.CutPrefix(name, p); ok {
			return rest, true
		}
	}
	return "", false
}

// XattrRecord begins the keyword of a PAX record that holds an extended attribute, as star and GNU tar write it.
const XattrRecord = "SCHILY.xattr."

// A record's keyword ends at the first "=". GNU tar and bsdtar therefore escape "=" in the attribute's name, and "%"
// too.
var unescapeName = strings.NewReplacer("%3D", "=", "%25", "%")

// EscapeName returns the name of an extended attribute as it is written after XattrRecord.
func EscapeName(name string) string {
	if strings.Contains(name, "%3D") || strings.Contains(name, "%25") {
		name = strings.ReplaceAll(name, "%", "%25")
	}
	return strings.ReplaceAll(name, "=", "%3D")
}

// Xattrs returns the extended attributes in PAX records, sorted by name. It reads the records of star and GNU tar, and
// libarchive's for attributes that these do not have. If several records name the same attribute with different
// escapes, the least value in byte order is used. If a name or value can't be decoded, the error is ErrInvalidArgument.
// An ACL in the format of Solaris's tar, which no attribute repeats, is listed under its record's keyword without a
// value. The result shares no memory with records, which may be far larger.
func Xattrs(records map[string]string) ([]Xattr, error) {
	var list []Xattr
	for k, v := range records {
		if name, ok := strings.CutPrefix(k, XattrRecord); ok {
			list = append(list, Xattr{unescapeName.Replace(name), []byte(v)})
		} else if kind, ok := strings.CutPrefix(k, "SCHILY.acl."); ok {
			_, both := records[XattrRecord+"system.posix_acl_"+kind]
			if !both && (kind != "access" || strings.Contains(v, "mask:")) { // otherwise the ACL says no more than the mode
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

// LinkTarget returns the cleaned path of a hard link's target. InvalidArgument: no hard link may have that target.
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

package remotes

import (
	"errors"
	"strings"

	"github.com/containerd/errdefs"
)

// nextLink returns the target of the link to the next page in the values of Link headers (RFC 8288); ok is false if
// there is none. Malformed links are an error of class DataLoss, because otherwise a truncated list would be taken for
// a complete one.
func nextLink(values []string) (target string, ok bool, err error) {
	for _, value := range values {
		for rest := value; ; {
			rest = strings.TrimLeft(rest, ", \t") // empty list elements are allowed
			if rest == "" {
				break
			}
			var link string
			var params map[string]string
			if link, params, rest, err = parseLink(rest); err != nil {
				return "", false, classf(errdefs.ErrDataLoss, "malformed Link header %q: %w", printable(value), err)
			}
			if _, anchored := params["anchor"]; anchored || !isNext(params["rel"]) {
				continue
			}
			if ok && link != target {
				return "", false, classf(errdefs.ErrDataLoss, "the list has two next pages: %q and %q", printable(target), printable(link))
			}
			target, ok = link, true
		}
	}
	return target, ok, nil
}

func isNext(rel string) bool {
	for _, r := range strings.Fields(rel) {
		if strings.EqualFold(r, "next") {
			return true
		}
	}
	return false
}

// parseLink parses one link-value (RFC 8288, section 3), and returns the text after it. Names of parameters are in
// lower case. The first of several parameters with one name counts.
func parseLink(s string) (target string, params map[string]string, rest string, err error) {
	s, ok := strings.CutPrefix(s, "<")
	if !ok {
		return "", nil, "", errors.New("no target in angle brackets")
	}
	if target, s, ok = strings.Cut(s, ">"); !ok {
		return "", nil, "", errors.New("the target has no closing bracket")
	}
	params = map[string]string{}
	for {
		s = strings.TrimLeft(s, " \t")
		if s == "" || s[0] == ',' {
			return target, params, s, nil
		}
		if s[0] != ';' {
			return "", nil, "", errors.New("no semicolon before a parameter")
		}
		s = strings.TrimLeft(s[1:], " \t")
		n := strings.IndexAny(s, "=;, \t")
		if n < 0 {
			n = len(s)
		}
		name, value := strings.ToLower(s[:n]), ""
		s = strings.TrimLeft(s[n:], " \t")
		if rest, ok := strings.CutPrefix(s, "="); ok {
			if value, s, err = parseValue(strings.TrimLeft(rest, " \t")); err != nil {
				return "", nil, "", err
			}
		}
		if _, seen := params[name]; !seen {
			params[name] = value
		}
	}
}

// parseValue parses a token or a quoted string.
func parseValue(s string) (value, rest string, err error) {
	if !strings.HasPrefix(s, `"`) {
		n := strings.IndexAny(s, ";, \t")
		if n < 0 {
			n = len(s)
		}
		return s[:n], s[n:], nil
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '"':
			return b.String(), s[i+1:], nil
		case '\\':
			if i++; i == len(s) {
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return "", "", errors.New("a quoted string has no closing quote")
}

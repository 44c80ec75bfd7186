// Return a new element with properties and children. Texts stay texts: nothing on this page is ever read as markup.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

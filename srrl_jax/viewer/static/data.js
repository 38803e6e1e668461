const EXPORT = null; // of files: their answers
